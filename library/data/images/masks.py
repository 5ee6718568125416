"""Masks of the loss: found beside the images, and brought to the size of the latents."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from library.core.log import get_logger
from library.core.tensor_file import listing
from library.data.images.files import files_in

logger = get_logger(__name__)


def pooled_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (H, W) float32 at the size of latents (height, width): the mean over the pixels of each latent position."""
    return F.adaptive_avg_pool2d(mask[None, None], (height, width))[0, 0]


def mask_files(folder: Path, images: list[Path]) -> tuple[dict[Path, Path], list[Path]]:
    """The mask of each image, the file of the same stem in `folder` (the last of several, with a warning); and images with none."""
    files = files_in(folder)
    by_stem = {path.stem: path for path in files}
    if unused := [path.name for path in files if by_stem[path.stem] != path]:
        logger.warning("%s: %d masks are not used, as another has the same name: %s", folder, len(unused), listing(unused))
    found = {image: by_stem[image.stem] for image in images if image.stem in by_stem}
    return found, [image for image in images if image not in found]
