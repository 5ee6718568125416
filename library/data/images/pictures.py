"""Pictures: the pixels of an image, and its mask, as the model sees them at one use."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.images.colors import ColorChange
from library.data.images.crops import Crop
from library.data.images.files import read_layers, read_mask
from library.data.images.resizing import resize, resize_mask
from library.data.options import Size

PREPROCESSING = "exif, profile to sRGB, alpha on white or apart, area or lanczos, 2"
"""Part of every key of cached latents: raise the number when pixels change."""

MOST_RATIO_ERROR = 0.01  # between a mask and its image


class Picture(NamedTuple):
    """What one use of an image shows."""

    pixels: Tensor  # (3, height, width) float32 in [-1, 1]
    mask: Tensor | None  # (height, width) float32 in [0, 1]; 1 counts in the loss


def load_picture(
    path: Path,
    crop: Crop,
    *,
    interpolation: str | None = None,
    color: ColorChange | None = None,
    alpha: bool = False,
    mask: Path | None = None,
) -> Picture:
    """The image resized, cropped, changed in colour, then mirrored, and its mask made to fit in the same way.

    With `alpha` the image's own transparency is the mask (all counts where it has none), and its colours are taken as stored;
    otherwise it is laid on white. `mask` is an image whose red channel counts; with both, what both let through counts.
    Raises `ValueError` naming a file that cannot be read, and a mask of another shape than its image.
    """
    _check_area(path, crop.resized)
    layers = read_layers(path)
    image = layers.rgb if alpha else layers.on_white()
    pixels = _cut(resize(image, crop.resized, interpolation), crop)
    if color is not None:
        pixels = color.applied(pixels)
    if crop.flipped:
        pixels = pixels[:, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1.0)
    masks = [] if mask is None else [_fitted(_mask_of(mask, path, image.size), crop)]
    if alpha:
        masks.append(torch.ones(tensor.shape[1:]) if layers.alpha is None else _fitted(layers.alpha, crop))
    return Picture(tensor, torch.stack(masks).prod(0) if masks else None)


# Masks


def mask_problem(mask: Path, size: Size, image: Path, image_size: Size) -> str | None:
    """Why a mask of `size` cannot belong to an image of `image_size`, or None."""
    if abs(size[0] * image_size[1] / (size[1] * image_size[0]) - 1) <= MOST_RATIO_ERROR:
        return None
    return f"{mask}: the mask is {size[0]}x{size[1]}, and {image} is {image_size[0]}x{image_size[1]}; make it as large as the image"


def _mask_of(path: Path, image: Path, size: Size) -> Image.Image:
    """The mask of an image of `size`, at the mask's own size."""
    mask = read_mask(path)
    if problem := mask_problem(path, mask.size, image, size):
        raise ValueError(problem)
    return mask


def _fitted(mask: Image.Image, crop: Crop) -> Tensor:
    values = _cut(resize_mask(mask, crop.resized), crop)
    if crop.flipped:
        values = values[:, ::-1]
    return torch.from_numpy(values.astype(np.float32, order="C")).div_(255.0)


# Cropping


def _cut(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """The crop's part of (height, width, ...) pixels."""
    (left, top), (width, height) = crop.corner, crop.size
    assert left >= 0 and top >= 0 and left + width <= pixels.shape[1] and top + height <= pixels.shape[0], "crop outside of the image"
    return pixels[top : top + height, left : left + width]


def _check_area(path: Path, resized: Size) -> None:
    """A sliver of an image, made to cover its bucket, may be larger than any memory."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and resized[0] * resized[1] > 2 * limit:
        raise ValueError(f"{path}: would be {resized[0]}x{resized[1]} to cover its bucket; crop it to a less extreme shape or remove it")
