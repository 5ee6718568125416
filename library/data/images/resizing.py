"""Resizing: pixels at a new size, averaged by area or interpolated."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.options import Size

INTERPOLATIONS: dict[str, Image.Resampling | None] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "area": None,
}
"""Pillow's filter for each value of `resize_interpolation`; None where the rule is our own."""


def resize(image: Image.Image, size: Size, interpolation: str | None = None) -> np.ndarray:
    """An image of mode L or RGB at a new (width, height): (height, width) or (height, width, 3) uint8.

    Without `interpolation`: by area when both sides shrink, else Lanczos. The area rule is that of OpenCV's INTER_AREA: an
    output pixel is the mean of the input it covers, edges by their share; it holds for enlarging too. Pillow's filters widen
    with the shrinking, so that none of them but `nearest` leaves pixels out.
    """
    if image.size == size:
        return np.asarray(image)
    if interpolation is None:
        interpolation = "area" if size[0] < image.size[0] and size[1] < image.size[1] else "lanczos"
    resampling = INTERPOLATIONS[interpolation]
    return _by_area(np.array(image), size) if resampling is None else np.asarray(image.resize(size, resampling))


def resize_mask(mask: Image.Image, size: Size) -> np.ndarray:
    """A mask (mode L) at a new (width, height), as (height, width) uint8: never beyond its own values, as Lanczos would ring."""
    shrinks = size[0] <= mask.size[0] and size[1] <= mask.size[1]
    return resize(mask, size, "area" if shrinks else "bilinear")


# Area averaging

SPAN = 24  # rows that one small matrix product reads: a band along the diagonal of the whole, which is zero elsewhere


def _by_area(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pixels (height, width) or (height, width, channels) uint8 at a new size, first lower, then narrower."""
    (width, height), length = size, pixels.shape[1]
    channels = torch.eye(pixels.size // (len(pixels) * length))
    rows = torch.from_numpy(pixels.reshape(len(pixels), -1))
    lower = torch.empty(height, rows.shape[1])
    for new, old, shares in _bands(len(pixels), height):
        torch.matmul(shares, rows[old].float(), out=lower[new])
    means = torch.empty(height, width * len(channels))
    for new, old, shares in _bands(length, width):
        means[:, _times(new, len(channels))] = lower[:, _times(old, len(channels))] @ torch.kron(shares, channels).T
    return means.round_().clamp_(0, 255).to(torch.uint8).view(height, width, *pixels.shape[2:]).numpy()


def _bands(length: int, count: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """The matrix (count, length) that averages equal spans of an axis, borders by their shares, in bands: rows, columns, values."""
    borders = np.linspace(0, length, count + 1)
    step = max(4, SPAN * count // length)
    for start in range(0, count, step):
        own = borders[start : start + step + 1]
        first, last = int(own[0] + 1e-9), min(math.ceil(own[-1] - 1e-9), length)
        covered = np.arange(first, last)
        shares = np.minimum(own[1:, None], covered + 1) - np.maximum(own[:-1, None], covered)
        values = torch.from_numpy((shares.clip(0) * (count / length)).astype(np.float32))
        yield slice(start, start + len(values)), slice(first, last), values


def _times(span: slice, channels: int) -> slice:
    return slice(span.start * channels, span.stop * channels)
