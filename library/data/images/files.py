"""Image files: which there are, whether they are whole, their sizes from the headers, and their pixels as RGB."""

import importlib
import os
import struct
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, features

from library.core.log import get_logger
from library.core.tensor_file import listing
from library.data.file_index import FileIndex
from library.data.images.layers import Layers, layers_of, orientation, upright_size
from library.data.images.tails import tail_problem
from library.data.options import Size

logger = get_logger(__name__)
Read = TypeVar("Read")
MOST_THREADS = 8  # decoded images are large

_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error)  # what Pillow's readers were seen to raise
_ALWAYS_READ = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_HEIC_STARTS = (b"ftypheic", b"ftypheix", b"ftypmif1")  # ISO/IEC 23008-12, annex B.4
_NEVER_READ = {".jfif": "rename them to .jpg", **dict.fromkeys((".gif", ".tif", ".tiff", ".heic", ".heif"), "convert them to .png")}


def image_endings() -> frozenset[str]:
    """The endings of the image files that are read with the libraries installed here."""
    return _ALWAYS_READ | {ending for ending, is_read in _read_by_libraries().items() if is_read}


def unread_endings() -> dict[str, str]:
    """The endings of image files that are not read, and what to do about each."""
    advice = {".avif": "install a Pillow that has AVIF (11.3 or later)", ".jxl": "pip install pillow-jxl-plugin"}
    unread = {ending: advice[ending] for ending, is_read in _read_by_libraries().items() if not is_read}
    return unread | _NEVER_READ


def files_in(folder: Path, endings: Collection[str] | None = None) -> list[Path]:
    """The files directly in `folder` with one of the endings (in any case; those of images that are read), sorted by name."""
    endings = image_endings() if endings is None else endings
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file() and os.path.splitext(entry.name)[1].lower() in endings]
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def read_size(path: Path) -> Size:
    """Width and height as shown (EXIF orientation applied), from the header alone. Raises `ValueError` naming an unreadable file."""
    return _reading(path, upright_size)


def read_layers(path: Path) -> Layers:
    """The image as shown: upright, 8-bit RGB in sRGB, transparency apart. Raises `ValueError` naming an unreadable file."""
    return _reading(path, partial(layers_of, path=path))


def read_rgb(path: Path) -> Image.Image:
    """The image as shown, with transparency laid on white (mode RGB). Raises `ValueError` naming an unreadable file."""
    return read_layers(path).on_white()


def read_mask(path: Path) -> Image.Image:
    """A mask (mode L): the red channel of an upright image as stored, whatever its profile; what is transparent is 0."""
    return _reading(path, partial(layers_of, path=path, as_srgb=False)).seen_red()


def is_stored_upright(path: Path) -> bool:
    """Is an image shown as it is stored, not turned or mirrored by its EXIF orientation? Raises `ValueError` as `read_size` does."""
    return _reading(path, orientation) == 1


def check_whole(path: Path) -> None:
    """Decode the whole file. Raises `ValueError` that names a file which does not."""
    _reading(path, lambda image: image.load())


def measure(paths: Sequence[Path], *, whole: bool = False, index: FileIndex | None = None) -> tuple[dict[Path, Size], dict[Path, str]]:
    """The sizes of image files, and what is wrong with those that have none, by path.

    The headers are read, and a file whose end looks cut off is decoded; with `whole` every file is. What `index` knows is not
    read again, and what is found is remembered there (the caller saves it).
    """
    sizes: dict[Path, Size] = {}
    problems: dict[Path, str] = {}
    animated: list[Path] = []
    if index is not None:
        sizes |= {path: size for path in paths if (size := _remembered(index, path, whole)) is not None}
    unknown = [path for path in dict.fromkeys(paths) if path not in sizes]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        for path, found in zip(unknown, threads.map(partial(_examined, whole=whole), unknown), strict=True):
            if isinstance(found, str):
                problems[path] = found
                continue
            sizes[path] = found.size
            animated += [path] if found.is_animated else []
            if index is not None:
                index.remember_size(path, found.size, whole=found.is_whole)
    if animated:
        names = listing(path.name for path in animated)
        logger.warning("%d images are animated; their first frames are used: %s", len(animated), names)
    return sizes, problems


# Opening


def _remembered(index: FileIndex, path: Path, whole: bool) -> Size | None:
    try:
        return index.size(path) if not whole or index.is_whole(path) else None
    except OSError:
        return None  # not there, which reading it will say


class _Found(NamedTuple):
    size: Size
    is_animated: bool
    is_whole: bool = False


def _examined(path: Path, whole: bool) -> _Found | str:
    """What is found out about a file, or what is wrong with it."""
    try:
        found = _reading(path, lambda image: _Found(upright_size(image), _is_animated(image)))
        if whole or tail_problem(path):
            check_whole(path)
            found = found._replace(is_whole=True)
        return found
    except (ValueError, OSError) as error:
        return str(error)


def _is_animated(image: Image.Image) -> bool:
    return image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a camera's JPEG with a preview or depths behind it


def _reading(path: Path, read: Callable[[Image.Image], Read]) -> Read:
    if path.suffix.lower() == ".jxl":
        _read_by_libraries()  # lets Pillow know of them, in this process
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels")
            if not all(image.size):
                raise ValueError("it has no pixels")
            return read(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: cannot be read ({error}); make it smaller or remove it") from error
    except _READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read ({_reason(path, error)}); replace or remove it") from error


def _reason(path: Path, error: Exception) -> str:
    if not isinstance(error, Image.UnidentifiedImageError):
        return (str(error) or type(error).__name__).partition("\n")[0]
    with path.open("rb") as file:
        start = file.read(12)
    if start[4:] in _HEIC_STARTS:
        return "a HEIC image, whatever its name says"
    return "not an image" if start else "the file is empty"


@cache
def _read_by_libraries() -> dict[str, bool]:
    """The endings that need more than every Pillow has, and whether it is there."""
    return {".avif": features.check("avif") is True, ".jxl": _register_jxl()}


def _register_jxl() -> bool:
    try:
        importlib.import_module("pillow_jxl")  # it registers itself
    except ImportError:
        return False
    return True
