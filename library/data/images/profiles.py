"""Colour profiles: images with an embedded ICC profile become sRGB, which is what the models were trained on."""

from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from library.core.log import get_logger, warn_once

logger = get_logger(__name__)
_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}  # bytes 16 to 19 of a profile, by image mode (ICC.1:2022, table 19)
_EXACT = ImageCms.Flags.HIGHRESPRECALC | ImageCms.Flags.NOCACHE  # finer tables; a cache of the last colour slows photographs
_TOLERANCE = 1  # of 255: a profile that changes no colour by more is sRGB
_PROBE_STEPS = 9  # colours of each channel that are tried for that


def in_srgb(image: Image.Image, profile: bytes | None, path: Path) -> Image.Image:
    """An image of mode L, RGB or CMYK as RGB in sRGB. A profile that cannot be used is ignored, with a warning that names `path`."""
    if not profile:
        return image.convert("RGB")
    try:
        image = _fitting(image, profile)
        transform = _transform(profile, image.mode)
        return image.convert("RGB") if transform is None else _applied(transform, image)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        warn_once(logger, f"{path}: its colour profile is ignored ({error})")
        return image.convert("RGB")


def _fitting(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in the mode that the profile is for: grey images often carry the profile of a colour image."""
    space = profile[16:20]
    if space == b"RGB " and image.mode == "L":
        return image.convert("RGB")
    if space != _SPACES[image.mode]:
        raise ValueError(f"it is for {space!r}, the image is {image.mode}")
    return image


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way to sRGB, or None where that changes nothing."""
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(_opened(profile), srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, _EXACT)
    if mode == "CMYK":
        return transform
    probe = Image.fromarray(_probe(mode))
    changed = np.asarray(_applied(transform, probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(changed).max() > _TOLERANCE else None


def _probe(mode: str) -> np.ndarray:
    if mode == "L":
        return np.arange(256, dtype=np.uint8)[None]
    levels = np.linspace(0, 255, _PROBE_STEPS).astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "only a change in place returns nothing"
    return converted


def _opened(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(BytesIO(profile))
