"""Metadata files: images with their captions and tags, as one JSON object or as JSON lines.

`.json`: `{"<image>": {"caption": ..., "tags": ..., "image_size": [width, height]}, ...}`; `.jsonl`: one object a line, with the image
in `image_path`, and its size in `image_size` or in `width` and `height`. An image is a path (absolute, from the subset's `image_dir`,
or from the working directory), or a file name without its ending somewhere in `image_dir`.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import listing
from library.data.captions.files import caption_lines, decoded
from library.data.images.files import files_in, image_endings, unread_endings
from library.data.options import Size, SubsetOptions

logger = get_logger(__name__)
_HALF = re.compile(r"[\ud800-\udfff]")  # of a character that JSON writes as two; alone it is no text
KEYS = ("image_path", "caption", "tags", "image_size", "width", "height")


class Described(NamedTuple):
    """An image of a metadata file."""

    path: Path
    caption: str  # with its tags; several lines where wildcards draw one
    size: Size | None  # as the file says


def read_metadata_file(path: Path, image_dir: Path | None, options: SubsetOptions) -> list[Described]:
    """The images of a metadata file in its order, each with its caption: caption and tags, or else the class tokens.

    Raises `OptionError` with everything wrong in the file, by key or line: broken JSON, wrong types, images that are missing, given
    twice, ambiguous or of a kind that is not read, and images without any text. Keys that are not read are named in a warning.
    """
    if image_dir is not None and not image_dir.is_dir():
        raise OptionError([f"{image_dir}: {'is not a folder' if image_dir.exists() else 'no such folder'} (image_dir of {path})"])
    reader = _Reader(options, _Images(image_dir))
    images = [image for entry in _entries(path, reader.problems) if (image := reader.described(entry)) is not None]
    if not images and not reader.problems:
        reader.problems.append("names no images")
    if reader.problems:
        raise OptionError(f"{path}: {problem}" for problem in reader.problems)
    if reader.unread:
        counts = [f"{name} ({count} images)" for name, count in reader.unread.most_common()]
        logger.warning("%s: keys that are not read: %s", path, listing(counts, 20))
    return images


class _Entry(NamedTuple):
    where: str  # its key or line, for messages
    image: Any
    values: Any


class _Reader:
    """Turns entries into images, and collects what is wrong with them."""

    def __init__(self, options: SubsetOptions, images: "_Images") -> None:
        self.options = options
        self.images = images
        self.problems: list[str] = []
        self.unread: Counter[str] = Counter()
        self._given: dict[str, str] = {}  # file -> the entry that names it

    def described(self, entry: _Entry) -> Described | None:
        """The image of an entry, or None where there are problems with it."""
        known = len(self.problems)
        if not isinstance(entry.values, dict):
            self._wrong(entry, "must be an object with caption or tags", entry.values)
            return None
        self.unread.update(entry.values.keys() - KEYS)
        caption, size, path = self._caption(entry), self._size(entry), self._path(entry)
        return Described(path, caption, size) if path is not None and len(self.problems) == known else None

    def _caption(self, entry: _Entry) -> str:
        """Caption and tags; with wildcards the tags stand on every line of the caption."""
        caption, tags = self._text(entry, "caption"), self._text(entry, "tags")
        if caption is None or tags is None:
            return ""
        lines = caption_lines(caption) or [""]
        tags = _joined(caption_lines(tags), self.options)
        texts = [_joined([line, tags], self.options) for line in (lines if self.options.enable_wildcard else lines[:1])]
        if not any(texts) and self.options.class_tokens is None:
            given = listing(entry.values) or "none"
            self.problems.append(f"{entry.where}: has neither caption nor tags (its keys: {given}); write one, or give class_tokens")
        return "\n".join(texts) or self.options.class_tokens or ""

    def _text(self, entry: _Entry, name: str) -> str | None:
        """A text of the entry, empty where it has none, or None where it is something else."""
        value = entry.values.get(name)
        if value is None or isinstance(value, str):
            if value and _HALF.search(value):
                self.problems.append(f"{entry.where}: {name} has half of a character (a lone surrogate); write that character anew")
            return value or ""
        self._wrong(entry, f"{name} must be a text", value)
        return None

    def _size(self, entry: _Entry) -> Size | None:
        values = entry.values
        sides = values.get("image_size")
        if sides is None and values.keys() & {"width", "height"}:
            sides = [values.get("width"), values.get("height")]
        if sides is None:
            return None
        if not (isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
            self._wrong(entry, "the size must be a width and a height in pixels", sides)
            return None
        return sides[0], sides[1]

    def _path(self, entry: _Entry) -> Path | None:
        if not isinstance(entry.image, str) or not entry.image:
            self._wrong(entry, "image_path must be the path of an image", entry.image)
            return None
        found = self.images.find(entry.image)
        problem = self._problem_with(found, entry)
        if problem:
            named = "" if entry.where == f"'{entry.image}'" else f"'{entry.image}' "
            self.problems.append(f"{entry.where}: {named}{problem}")
        return None if problem else found[0]

    def _problem_with(self, found: list[Path], entry: _Entry) -> str | None:
        if len(found) != 1:
            names = listing(map(str, found))
            return (
                f"may be each of {names}; give its path" if found else f"is no image in {self.images.image_dir or 'the working directory'}"
            )
        ending = found[0].suffix.lower()
        if ending not in image_endings():
            return f"is of a kind that is not read ({unread_endings().get(ending, 'no image')})"
        first = self._given.setdefault(os.path.normpath(found[0].absolute()), entry.where)
        return None if first == entry.where else f"is given already by {first}"

    def _wrong(self, entry: _Entry, what: str, value: Any) -> None:
        self.problems.append(f"{entry.where}: {what}, not {json.dumps(value)[:60]}")


def _joined(parts: list[str], options: SubsetOptions) -> str:
    """The parts that are not empty, with one separator and a space between them."""
    parts = [part for part in parts if part]
    separator = options.caption_separator.rstrip()
    return options.caption_joint.join([*(part.removesuffix(separator).rstrip() for part in parts[:-1]), *parts[-1:]])


class _Images:
    """Finds the images that keys name; folders are listed once."""

    def __init__(self, image_dir: Path | None) -> None:
        self.image_dir = image_dir
        self._listed: dict[str, dict[str, list[Path]]] = {}
        self._below: dict[str, list[Path]] | None = None

    def find(self, key: str) -> list[Path]:
        """The files that a key may mean: a path first, then a name without ending, last one in a folder below `image_dir`."""
        folders = [""] if self.image_dir is None or os.path.isabs(key) else [str(self.image_dir), ""]  # noqa: PTH117 - 100,000s of keys
        for place in (os.path.join(folder, key) for folder in folders):
            if os.path.isfile(place):  # noqa: PTH113 - unlike Path, also for a text too long to be a name
                return [Path(place)]
            parent, name = os.path.split(place)
            if found := self._in(parent).get(name):
                return found
        return self._anywhere().get(key, [])

    def _in(self, folder: str) -> dict[str, list[Path]]:
        if folder not in self._listed:
            is_there = os.path.isdir(folder or ".")  # noqa: PTH112 - as above
            self._listed[folder] = _by_name(files_in(Path(folder)) if is_there else [])
        return self._listed[folder]

    def _anywhere(self) -> dict[str, list[Path]]:
        if self._below is None:
            self._below = _by_name(_files_below(self.image_dir) if self.image_dir else [])
        return self._below


def _by_name(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by their names with and without ending."""
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(path.name, []).append(path)
        found.setdefault(path.stem, []).append(path)
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for place, inner, _ in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from files_in(Path(place))


# The two formats


def _entries(path: Path, problems: list[str]) -> Iterator[_Entry]:
    """The entries of the file. What keeps the file or a line from being read is added to the problems."""
    readers = {".json": _object_entries, ".jsonl": _line_entries}
    read = readers.get(path.suffix.lower())
    if read is None:
        problems.append("is neither .json nor .jsonl; metadata_file names a list of images in one of the two formats")
        return
    try:
        text, _ = decoded(path.read_bytes())
    except ValueError as error:
        problems.append(f"{error}; save it as UTF-8")
    except OSError as error:
        problems.append(f"cannot be read ({error.strerror or error})")
    else:
        yield from read(text, problems)


def _object_entries(text: str, problems: list[str]) -> Iterator[_Entry]:
    doubled: list[str] = []
    try:
        table = _parsed(text, doubled)
    except ValueError as error:
        problems.append(f"is not JSON ({error})")
        return
    problems += [f"'{key}': the key is there twice in one object" for key in doubled]
    if not isinstance(table, dict):
        problems.append("must hold one object: image -> its caption and tags")
        return
    for key, values in table.items():
        yield _Entry(f"'{key}'", key, values)


def _line_entries(text: str, problems: list[str]) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        doubled: list[str] = []
        try:
            values = _parsed(line, doubled)
        except ValueError as error:
            problems.append(f"line {number}: is not JSON ({error})")
            continue
        problems += [f"line {number}: the key '{key}' is there twice" for key in doubled]
        yield _Entry(f"line {number}", values.get("image_path") if isinstance(values, dict) else None, values)


def _parsed(text: str, doubled: list[str]) -> Any:
    """JSON as Python values; keys that an object has twice are added to `doubled`. Raises `ValueError` for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            doubled.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
