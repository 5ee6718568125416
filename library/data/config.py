"""From a dataset file, or folders named by convention, to datasets whose every option is settled.

Which value wins: subset > dataset > general > command line > default. All mistakes are reported together.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from library.core.config_file import read_toml
from library.core.log import get_logger
from library.core.options import Given, OptionError, convert, declared
from library.core.spelling import nearest, unknown
from library.data.options import (
    COMMAND_LINE_NAMES,
    ELSEWHERE,
    LEVELS,
    DataOptions,
    DatasetOptions,
    SubsetOptions,
    dataset_keys,
    levels,
    limit_problem,
)
from library.data.places import Places, Table, places_of

logger = get_logger(__name__)
KEYS = dataset_keys()
KNOWN_ATTRIBUTES = frozenset({"diff_output_preservation"})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset with its subsets, every option settled."""

    options: DatasetOptions
    subsets: tuple[SubsetOptions, ...]
    where: Mapping[str, str]  # key of the dataset -> the place that gave it, for messages


def read_datasets(options: DataOptions, default_resolution: int) -> list[Dataset]:
    """The datasets that the options name. Raises `OptionError` with every mistake of the dataset file, or of the folders."""
    if options.dataset_config is not None:
        for name in ("train_data_dir", "reg_data_dir", "validation_data_dir", "in_json"):
            if getattr(options, name) is not None:
                logger.warning("--%s is not used: --dataset_config names the folders", name)
        datasets = _read_file(options.dataset_config, options, default_resolution)
    elif options.train_data_dir is None and options.in_json is None:
        raise OptionError(["no images to train with; give --dataset_config FILE, or --train_data_dir FOLDER"])
    else:
        datasets = [_from_folders(options, default_resolution)]
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if options.masked_loss and not any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets):
        raise OptionError(["--masked_loss: there are no masks; give a subset conditioning_data_dir = FOLDER, or alpha_mask = true"])
    _tell_unknown_attributes(subsets)
    return datasets


# The dataset file


def _read_file(path: Path, options: DataOptions, default_resolution: int) -> list[Dataset]:
    table, text = _load(path)
    reader = _Reader(path, places_of(path, text), options.masked_loss)
    general = reader.read_table(table.get("general") or {}, ("general",), "general")
    reader.check_top(table)
    base = _command_line_values(options, default_resolution) | general
    datasets = [reader.read_dataset(entry, index, base) for index, entry in enumerate(reader.tables(table, "datasets", ()))]
    if not datasets and not reader.problems:
        reader.problems.append(f"{path}: has no [[datasets]]; add one, with a [[datasets.subsets]] that names an image_dir")
    if reader.problems:
        raise OptionError(dict.fromkeys(reader.problems))
    return [dataset for dataset in datasets if dataset is not None]


def _load(path: Path) -> tuple[dict[str, Any], str]:
    if path.suffix.lower() != ".json":
        return read_toml(path, "--dataset_config")
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text, object_pairs_hook=_unique)
    except FileNotFoundError:
        raise OptionError([f"--dataset_config {path}: no such file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError([f"--dataset_config {path}: {error}"]) from None
    if not isinstance(table, dict):
        raise OptionError([f"--dataset_config {path}: must hold an object with 'general' and 'datasets'"])
    return table, text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON file; `json` itself would take the last of two values."""
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"the key '{twice[0]}' is there twice in one object")
    return table


class _Reader:
    """Reads the tables of one file and collects what is wrong with them."""

    def __init__(self, path: Path, places: Places, masked_loss: bool) -> None:
        self.path, self.places, self.masked_loss = path, places, masked_loss
        self.problems: list[str] = []

    def check_top(self, table: Mapping[str, Any]) -> None:
        for name in table:
            if name not in ("general", "datasets"):
                where = f"{self.path}{self.places.line((), name)}"
                if name in KEYS:
                    self.problems.append(f"{where}: '{name}' stands outside of every table; it is allowed in {_level_names(name)}")
                else:
                    self.problems.append(f"{where}: {unknown(name, ['general', 'datasets'], 'table')}")

    def tables(self, table: Mapping[str, Any], name: str, place: Table) -> list[Any]:
        """The list of tables under `name`; a single table is a mistake of brackets."""
        entries = table.get(name, [])
        if not isinstance(entries, list):
            header = LEVELS[name]
            line = self.places.line(place, name) or self.places.line((*place, 0))
            self.problems.append(f"{self.path}{line}: '{name}' must be a list of tables; write {header}, in two brackets")
            return []
        return entries

    def read_dataset(self, table: Any, index: int, base: dict[str, Given]) -> Dataset | None:
        """One dataset and its subsets over the values of the wider levels; None where something is wrong with it."""
        before = len(self.problems)
        place: Table = ("datasets", index)
        values = base | self.read_table(table, place, "datasets")
        subset_tables = self.tables(table, "subsets", place) if isinstance(table, dict) else []
        given = [self.read_table(entry, (*place, number), "subsets") for number, entry in enumerate(subset_tables)]
        where = f"{self.path}{self.places.line(place)} ([[datasets]] {index + 1})"
        if not given and len(self.problems) == before:
            self.problems.append(f"{where}: has no [[datasets.subsets]]; add one that names an image_dir")
        for number, subset in enumerate(given):
            if _names_nothing(subset_tables[number]):
                header = self.place_name((*place, number))
                self.problems.append(f"{header}: names no images; add image_dir = FOLDER, or metadata_file = FILE")
            self.problems += subset_problems(values | subset, subset, self.masked_loss)
        if len(self.problems) > before:
            return None
        subsets = _used([_build(SubsetOptions, values | subset) for subset in given], where)
        if not subsets:
            self.problems.append(f"{where}: num_repeats = 0 leaves all of its subsets out; remove the dataset")
            return None
        return Dataset(
            options=_build(DatasetOptions, values),
            subsets=subsets,
            where={key: item.where for key, item in values.items()},
        )

    def read_table(self, table: Any, place: Table, level: str) -> dict[str, Given]:
        """The checked values of one table, by key."""
        if not isinstance(table, dict):
            self.problems.append(f"{self.place_name(place)}: must be a table of keys and values, not {table!r}")
            return {}
        values = {}
        for key, value in table.items():
            if key == "subsets" and level == "datasets":
                continue
            where = self.place_name(place, key)
            problem = _key_problem(key, value, level)
            if problem:
                self.problems.append(f"{where}: {problem}")
            elif key in KEYS and value is not None:
                self._convert_into(values, key, value, where)
        return values

    def place_name(self, place: Table, key: str = "") -> str:
        """`data.toml line 7 ([[datasets.subsets]] 1.2)`: the file, the line where it can be told, and the table."""
        level = "subsets" if len(place) == 3 else str(place[0])
        numbers = ".".join(str(int(number) + 1) for number in place[1:])
        return f"{self.path}{self.places.line(place, key)} ({LEVELS[level]}{' ' + numbers if numbers else ''})"

    def _convert_into(self, values: dict[str, Given], key: str, value: Any, where: str) -> None:
        where = f"{where}: {key}"
        try:
            converted = convert(value, KEYS[key].kind, where, is_typed=True)
        except OptionError as error:
            self.problems += error.problems
            return
        problem = limit_problem(key, converted)
        if problem:
            self.problems.append(f"{where} = {value!r}: {problem}")
        else:
            values[key] = Given(key, converted, where)


def _names_nothing(table: Any) -> bool:
    """Does the table of a subset name neither a folder nor a metadata file?"""
    return isinstance(table, dict) and all(table.get(key) is None for key in ("image_dir", "metadata_file"))


def _key_problem(key: str, value: Any, level: str) -> str | None:
    """Why a key may not stand at a level, or None."""
    if key in KEYS:
        return None if level in levels(key) else f"'{key}' is not allowed here; it belongs in {_level_names(key)}"
    if key in ELSEWHERE:
        return f"'{key}' {ELSEWHERE[key]}" if value else None
    by_flag = {flag: name for name, flag in COMMAND_LINE_NAMES.items()}
    if key not in by_flag and key in {entry.name for entry in declared(DataOptions)}:
        return f"'{key}' belongs on the command line: --{key}"
    near = by_flag.get(key) or nearest(key, [*KEYS, *(["subsets"] if level == "datasets" else [])])
    if near is None:
        return f"unknown key '{key}'"
    if near == "subsets":
        return f"unknown key '{key}'; did you mean 'subsets', as in [[datasets.subsets]]?"
    return f"unknown key '{key}'; did you mean '{near}' (allowed in {_level_names(near)})?"


def subset_problems(values: Mapping[str, Given], own: Mapping[str, Given], masked_loss: bool) -> Iterator[str]:
    """What contradicts itself in a subset: `values` are all that hold there, `own` those that stand in its own table."""

    def on(key: str) -> Any:
        return values[key].value if key in values else KEYS[key].default

    if on("conditioning_data_dir") and not masked_loss:
        yield f"{values['conditioning_data_dir'].where}: ControlNets are not trained here; for loss masks add --masked_loss"
    if on("is_reg") and on("is_validation"):
        yield f"{values['is_validation'].where}: is_reg is set too; regularisation images are for training, keep one of the two"
    marked = (on("custom_attributes") or {}).get("diff_output_preservation", False)
    if not isinstance(marked, bool):
        yield f"{values['custom_attributes'].where}: diff_output_preservation must be true or false, not {marked!r}"
    if "validation_split" in own and on("is_validation"):
        yield f"{own['validation_split'].where}: has no effect, with is_validation all images are for validation; remove it"
    if "validation_split" in own and on("is_reg"):
        yield f"{own['validation_split'].where}: has no effect, regularisation images are never held out; remove it"
    if "caption_extension" in own and on("metadata_file"):
        yield f"{own['caption_extension'].where}: has no effect, captions come from metadata_file; remove it"


def _level_names(key: str) -> str:
    return ", ".join(LEVELS[level] for level in levels(key))


# Settling


def _command_line_values(options: DataOptions, default_resolution: int) -> dict[str, Given]:
    """The command line's values (given or default) under the names of the dataset file."""
    values = {}
    for key in KEYS:
        name = COMMAND_LINE_NAMES.get(key, key)
        if hasattr(options, name):
            values[key] = Given(key, options.value_for(key), f"--{name}")
    if options.resolution is None:
        values["resolution"] = Given("resolution", default_resolution, "--resolution (the model's own)")
    return values


def _build(group: type, values: Mapping[str, Given]) -> Any:
    names = {field.name for field in fields(group)}
    return group(**{key: item.value for key, item in values.items() if key in names})


def _used(subsets: list[SubsetOptions], where: str) -> tuple[SubsetOptions, ...]:
    """The subsets without those that repeat nothing, or whose folder (or metadata file) an earlier one has, as in sd-scripts."""
    kept: dict[str, SubsetOptions] = {}
    for subset in subsets:
        place = os.path.realpath(subset.metadata_file or subset.name)
        if subset.num_repeats == 0:
            logger.warning("%s: %s is left out (num_repeats = 0)", where, subset.name)
        elif place in kept:
            logger.warning("%s: %s is named twice; the later subset is not used (num_repeats shows images more often)", where, subset.name)
        else:
            kept[place] = subset
    return tuple(kept.values())


def _tell_unknown_attributes(subsets: Iterable[SubsetOptions]) -> None:
    for subset in subsets:
        for name in sorted(set(subset.custom_attributes or {}) - KNOWN_ATTRIBUTES):
            known = ", ".join(sorted(KNOWN_ATTRIBUTES))
            logger.warning("%s: the custom attribute '%s' has no effect; the trainer knows %s", subset.name, name, known)


# Folders named <repeats>_<class tokens>


def _from_folders(options: DataOptions, default_resolution: int) -> Dataset:
    values = _command_line_values(options, default_resolution)
    problems: list[str] = []
    tables: list[dict[str, Any]] = []
    if options.in_json is not None:
        tables.append({"image_dir": options.train_data_dir, "metadata_file": options.in_json})
    elif options.train_data_dir is not None:
        tables += _named_folders("--train_data_dir", options.train_data_dir, problems)
    if options.reg_data_dir is not None:
        tables += [{**table, "is_reg": True} for table in _named_folders("--reg_data_dir", options.reg_data_dir, problems)]
    if options.validation_data_dir is not None:
        named = _named_folders("--validation_data_dir", options.validation_data_dir, problems)
        tables += [{**table, "is_validation": True} for table in named]
    given = [values | {key: Given(key, value, "the command line") for key, value in table.items()} for table in tables]
    problems += [problem for each in given for problem in subset_problems(each, {}, options.masked_loss)]
    if problems:
        raise OptionError(dict.fromkeys(problems))
    subsets = tuple(_build(SubsetOptions, each) for each in given)
    return Dataset(options=_build(DatasetOptions, values), subsets=subsets, where={key: item.where for key, item in values.items()})


def _named_folders(flag: str, folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """A table for each folder inside `folder` whose name starts with repeats: the folder, its repeats and class tokens."""
    if not folder.is_dir():
        problems.append(f"{flag} {folder}: no such folder")
        return []
    found: list[dict[str, Any]] = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        repeats, _, tokens = inner.name.partition("_")
        if repeats.isascii() and repeats.isdigit() and int(repeats) > 0:
            found.append({"image_dir": inner, "num_repeats": int(repeats), "class_tokens": tokens or None})
        else:
            logger.warning("%s: the folder '%s' is not used; its name does not start with repeats, as 10_my token", flag, inner.name)
    if not found:
        problems.append(
            f"{flag} {folder}: has no folder named <repeats>_<class tokens>; put the images into one such as {folder / '10_my token'}"
        )
    return found
