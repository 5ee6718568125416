"""Generated pictures as files: PNG with the parameters that made them."""

import time
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from library.core.atomic import staged


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (batch, 3, height, width) in [-1, 1]; values outside are clipped."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]


def save_png(image: Image.Image, path: Path, parameters: Mapping[str, str]) -> None:
    """Write a PNG with text entries, atomically."""
    info = PngInfo()
    for key, value in parameters.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    with staged(path) as beside, beside.open("wb") as file:
        image.save(file, format="PNG", pnginfo=info)


def picture_path(folder: Path, index: int, seed: int, *, sequential: bool) -> Path:
    """The next free `im_<number>.png` where `sequential`, else `im_<date>_<index>_<seed>.png`; never that of a file that is there."""
    if sequential:
        return next(path for number in count() if not (path := folder / f"im_{number:06d}.png").exists())
    return free_path(folder, f"im_{time.strftime('%Y%m%d%H%M%S')}_{index:03d}_{seed}", ".png")


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """`<stem><suffix>` in the folder, or the first of `<stem>_2<suffix>`, `<stem>_3<suffix>`, ... that is not there."""
    names = chain([stem], (f"{stem}_{number}" for number in count(2)))
    return next(path for name in names if not (path := folder / f"{name}{suffix}").exists())
