"""Image files: their sizes from the headers, and their pixels resized, cropped and mirrored as the model shall see them."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.buckets import Placement
from library.data.options import Size

Read = TypeVar("Read")
IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
OTHER_IMAGE_ENDINGS = frozenset({".avif", ".jxl", ".gif", ".tif", ".tiff", ".heic"})  # named in a warning, never skipped in silence
PREPROCESSING = "exif, alpha on white, area or lanczos, 1"  # part of every cache key: raise the number when pixels change

_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # EXIF tag; see CIPA DC-008, section 4.6.4
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def files_in(folder: Path, endings: frozenset[str] = IMAGE_ENDINGS) -> list[Path]:
    """The files directly in `folder` with one of the endings (in any case), sorted by name."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file() and os.path.splitext(entry.name)[1].lower() in endings]
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def read_size(path: Path) -> Size:
    """Width and height as shown (EXIF orientation applied), from the header alone. Raises `ValueError` naming an unreadable file."""

    def size(image: Image.Image) -> Size:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)

    return _reading(path, size)


def read_rgb(path: Path) -> Image.Image:
    """The image as shown: upright, 8-bit RGB, transparency over white. Raises `ValueError` naming an unreadable file."""

    def rgb(image: Image.Image) -> Image.Image:
        orientation = _orientation(image)
        image.load()
        flat = _as_rgb(image)
        return flat.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else flat

    return _reading(path, rgb)


def load_pixels(path: Path, placement: Placement, corner: tuple[int, int], flipped: bool) -> Tensor:
    """Pixels (3, height, width) float32 in [-1, 1]: resized, cropped at `corner` (left, top), then mirrored if asked."""
    pixels = crop(resize(np.asarray(read_rgb(path)), placement.resized), corner, placement.bucket)
    if flipped:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1.0)


def resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pixels (height, width, 3) uint8 at a new (width, height): averaged by area when both sides shrink, else Lanczos.

    The area rule is that of OpenCV's INTER_AREA: an output pixel is the mean of the input it covers, edges by their share.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if size[0] < width and size[1] < height:
        lower = _mean_rows(pixels, size[1])
        smaller = _mean_rows(np.ascontiguousarray(lower.transpose(1, 0, 2)), size[0]).transpose(1, 0, 2)
        return np.rint(smaller).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def crop(pixels: np.ndarray, corner: tuple[int, int], size: Size) -> np.ndarray:
    """The part of (height, width, 3) pixels of `size` (width, height) whose left and top are `corner`."""
    (left, top), (width, height) = corner, size
    assert left >= 0 and top >= 0 and left + width <= pixels.shape[1] and top + height <= pixels.shape[0], "crop outside of the image"
    return pixels[top : top + height, left : left + width]


# Opening


def _reading(path: Path, read: Callable[[Image.Image], Read]) -> Read:
    try:
        with Image.open(path) as image:
            return read(image)
    except _READ_ERRORS as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason}); replace or remove it") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none; read without decoding, which PNG's own `getexif` would do."""
    orientation = Image.Image.getexif(image).get(_ORIENTATION)
    return orientation if isinstance(orientation, int) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.float32)
        scale = 257.0 if grey.max(initial=0) > 255 else 1.0
        return Image.fromarray(np.rint(grey / scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


# Area averaging


def _mean_rows(pixels: np.ndarray, count: int) -> np.ndarray:
    """Shrink the first axis to `count`: means over equal spans, a row on a border counted by its share on each side.

    One small matrix product a row: as fast as Pillow's box filter, which gives rows on a border to one side whole.
    """
    length = pixels.shape[0]
    rows = pixels.reshape(length, -1)
    borders = np.linspace(0, length, count + 1)
    first = np.floor(borders[:-1] + 1e-9).astype(int)
    last = np.minimum(np.ceil(borders[1:] - 1e-9).astype(int), length)
    means = np.empty((count, rows.shape[1]), np.float32)
    for index in range(count):
        covered = np.arange(first[index], last[index])
        share = np.minimum(borders[index + 1], covered + 1) - np.maximum(borders[index], covered)
        means[index] = share.astype(np.float32) @ rows[first[index] : last[index]].astype(np.float32)
    return (means * np.float32(count / length)).reshape(count, *pixels.shape[1:])
