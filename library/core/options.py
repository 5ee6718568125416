"""Options, declared once: a frozen dataclass field is the flag, the TOML key, the check and the row in the docs.

    @dataclass(kw_only=True, frozen=True)
    class LossOptions:
        loss_type: Literal["l2", "l1"] = option("l2", help="how the error of the guess is measured")

`parse_command_line` reads groups from a command line and its `--config_file`; `read_group` reads one group from pairs such as
`--network_args rank_dropout=0.1` or from a table of a dataset file. Every mistake is found before the first is reported.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from library.core.spelling import unknown

Group = TypeVar("Group")
TRUE_WORDS = {"true", "1", "yes", "on"}
FALSE_WORDS = {"false", "0", "no", "off"}


class OptionError(ValueError):
    """Everything wrong with the options a user gave, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Given:
    """A value that a user gave, and where it stands: `--seed`, `config.toml line 3 (seed)`, `--network_args conv_dim`.

    `is_typed` holds for values of TOML and JSON files, where `"2"` is a text and no number.
    """

    name: str
    value: Any
    where: str
    is_typed: bool = False


@dataclass(frozen=True)
class Declared:
    """One declared option, as read from its dataclass field."""

    name: str
    kind: Any  # the annotation
    default: Any
    help: str
    flags: tuple[str, ...]
    required: bool
    group: type
    is_secret: bool = False

    @property
    def is_flag(self) -> bool:
        return _core(self.kind) is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(_core(self.kind)) is tuple


def option(default: Any = MISSING, *, help: str, flags: Sequence[str] = (), required: bool = False, secret: bool = False) -> Any:
    """Declare an option. `flags` replaces the spelling `--<field name>`; a field without default is required.

    The value of a `secret` one (a token) is shown nowhere and written into no file.
    """
    metadata = {"help": help, "flags": tuple(flags), "required": required or default is MISSING, "secret": secret}
    return dataclasses.field(default=None if default is MISSING else default, repr=not secret, metadata=metadata)


def declared(group: type) -> list[Declared]:
    """The options of a group, its own before those it inherits, in the order of its fields (every field must be made by `option`)."""
    hints, own = typing.get_type_hints(group), inspect.get_annotations(group)
    fields = sorted(dataclasses.fields(group), key=lambda field: field.name not in own)
    return [
        Declared(
            name=field.name,
            kind=hints[field.name],
            default=field.default,
            help=field.metadata["help"],
            flags=field.metadata["flags"] or (f"--{field.name}",),
            required=field.metadata["required"],
            group=group,
            is_secret=field.metadata["secret"],
        )
        for field in fields
    ]


def read_group(group: type[Group], given: Iterable[Given], *, what: str = "option", elsewhere: Mapping[str, str] | None = None) -> Group:
    """Build one group from given values. `elsewhere` maps names that belong to another place to the advice to give.

    Raises `OptionError` with every unknown name (nearest one named), wrong type, bad choice and failed check at once.
    """
    options = {entry.name: entry for entry in declared(group)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for item in given:
        if item.name not in options:
            advice = (elsewhere or {}).get(item.name)
            problems.append(f"{item.where}: {advice}" if advice else f"{item.where}: {unknown(item.name, options, what)}")
        else:
            _convert_into(values, options[item.name], item, problems)
    return _build(group, values, problems)


def pairs(texts: Iterable[str], where: str) -> list[Given]:
    """`key=value` texts as given values (split at the first `=`). Raises `OptionError` for texts without one, and for a key given twice."""
    texts = list(texts)
    bad = [f"{where}: '{text}' is not of the form key=value" for text in texts if "=" not in text]
    if bad:
        raise OptionError(bad)
    split = [[part.strip() for part in text.split("=", 1)] for text in texts]
    keys = [key for key, _ in split]
    if doubles := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise OptionError([f"{where} {key}: given {keys.count(key)} times; give it once, with all that it shall hold" for key in doubles])
    return [Given(key, value, f"{where} {key}") for key, value in split]


def convert(value: Any, kind: Any, where: str, *, is_typed: bool = False) -> Any:
    """`value` (a text, or a typed value of a TOML/JSON file) as the annotation `kind` says. Raises `OptionError` with `where`."""
    if is_typed and isinstance(value, str) and _core(kind) in (bool, int, float, dict):
        raise OptionError([f"{where}: '{value}' is a text, but a {describe(kind)} is needed; write it without quotes"])
    try:
        return _convert(value, kind)
    except (ValueError, SyntaxError, TypeError) as error:
        raise OptionError([f"{where}: {error}"]) from None


def describe(kind: Any) -> str:
    """An annotation in a user's words: whole number, number, text, a|b|c."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in members if member is not type(None)))
    if origin is Literal:
        return "|".join(str(member) for member in members)
    if origin is tuple:
        return f"list of {describe(members[0])}" if members[-1] is Ellipsis else f"{len(members)} {describe(members[0])}s"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}.get(kind, "table")


# Building a group from converted values


def _convert_into(values: dict[str, Any], entry: Declared, item: Given, problems: list[str]) -> None:
    try:
        values[entry.name] = convert(item.value, entry.kind, item.where, is_typed=item.is_typed)
    except OptionError as error:
        problems += error.problems


def _build(group: type[Group], values: Mapping[str, Any], problems: list[str]) -> Group:
    missing = [entry for entry in declared(group) if entry.required and values.get(entry.name) is None]
    wrong = {entry.name for entry in missing if any(entry.name in problem for problem in problems)}
    problems += [f"{entry.flags[0]} is required: {entry.help}" for entry in missing if entry.name not in wrong]
    built = group(**values) if not missing else None
    check = getattr(built, "check", None)
    if check is not None:
        problems += check()
    if problems or built is None:
        raise OptionError(problems)
    return built


# Conversion by annotation


def _core(kind: Any) -> Any:
    """The annotation without `| None`, where exactly one other member remains."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        return members[0] if len(members) == 1 else kind
    return kind


def _convert(value: Any, kind: Any) -> Any:
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, kind, members)
    if origin is Literal:
        return _convert_choice(value, members)
    if origin is tuple:
        return _convert_tuple(value, members)
    return _CONVERTERS[kind](value)


def _convert_union(value: Any, kind: Any, members: tuple[Any, ...]) -> Any:
    if type(None) in members and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    rest = [member for member in members if member is not type(None)]
    if len(rest) == 1:
        return _convert(value, rest[0])
    for member in rest:
        try:
            return _convert(value, member)
        except (ValueError, SyntaxError, TypeError):
            continue
    raise ValueError(f"{value!r} is none of: {describe(kind)}")


def _convert_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice or str(value).lower() == str(choice).lower():
            return choice
    raise ValueError(unknown(str(value), [str(choice) for choice in choices], "choice"))


def _convert_tuple(value: Any, members: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, list) and len(value) == 1 < len(members) and members[-1] is not Ellipsis:
        value = value[0]  # `--range 1,2` arrives as one word of a list
    if isinstance(value, str):
        text = value.strip()
        value = ast.literal_eval(text) if text.startswith(("[", "(")) else [part.strip() for part in text.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [value]
    fixed = len(members) if members[-1] is not Ellipsis else None
    if fixed is not None and len(value) != fixed:
        raise ValueError(f"needs {fixed} values, has {len(value)}")
    kinds = members if fixed is not None else (members[0],) * len(value)
    return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in TRUE_WORDS | FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError(f"{value!r} is not true or false")


def _int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is not a whole number")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a whole number") from None


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    if number != number:
        raise ValueError("nan is no number that could be used")
    return number


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text; put it in quotes")
    return value


def _dict(value: Any) -> dict[str, Any]:
    table = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise ValueError(f"{value!r} is not a table")
    return table


_CONVERTERS = {bool: _bool, int: _int, float: _float, str: _str, Path: lambda value: Path(_str(value)), dict: _dict}
