"""The images of a run as it will use them, and how regularisation images are balanced against the others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from library.core.log import get_logger
from library.core.options import declared
from library.data.images.buckets import Placement
from library.data.options import Size, SubsetOptions

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEntry:
    """One image of a dataset, as the run will use it. There may be many: folders and placements are shared objects."""

    folder: Path
    name: str  # of the file in the folder
    size: Size  # as shown, before resizing
    placement: Placement
    repeats: int  # uses in an epoch
    caption: str  # as read; several lines where wildcards draw one
    dataset: int
    subset: int  # index within its dataset
    options: SubsetOptions
    mask: Path | None = None  # the image that says where the loss counts

    @property
    def path(self) -> Path:
        """The image file."""
        return self.folder / self.name

    @property
    def is_masked(self) -> bool:
        """Does a mask weigh the loss?"""
        return self.mask is not None or self.options.alpha_mask

    @property
    def preserves(self) -> bool:
        """Is what the base model predicts its target (`diff_output_preservation`)?"""
        return (self.options.custom_attributes or {}).get("diff_output_preservation") is True


def balanced(images: Sequence[ImageEntry]) -> list[ImageEntry]:
    """The images of one dataset with the repeats of regularisation images raised, one after the other, to match the others.

    As sd-scripts does: once they are as many as the training images, further regularisation images are not used.
    """
    wanted = sum(image.repeats for image in images if not image.options.is_reg)
    regular = [image for image in images if image.options.is_reg]
    if not regular:
        return list(images)
    uses = list(accumulate(image.repeats for image in regular))
    kept = next((number for number, total in enumerate(uses, 1) if total >= wanted), len(regular))
    if kept < len(regular):
        logger.warning(
            "%d of %d regularisation images are not used: an epoch has %d training images", len(regular) - kept, len(regular), wanted
        )
    rounds, rest = divmod(max(0, wanted - uses[kept - 1]), kept)
    matched = [replace(image, repeats=image.repeats + rounds + (number < rest)) for number, image in enumerate(regular[:kept])]
    return [image for image in images if not image.options.is_reg] + matched


def for_validation(images: Sequence[ImageEntry]) -> list[ImageEntry]:
    """The same images, each once and always alike: nothing about them is drawn but a wildcard."""
    steady: dict[int, SubsetOptions] = {}
    for image in images:
        if id(image.options) not in steady:
            steady[id(image.options)] = _steady(image.options)
    return [replace(image, repeats=1, options=steady[id(image.options)]) for image in images]


DRAWN = (
    "flip_aug", "random_crop", "color_aug", "face_crop_aug_range", "shuffle_caption", "caption_dropout_rate",
    "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_step", "custom_attributes",
)  # fmt: skip
"""What makes the uses of an image differ, or its target another one."""


def _steady(options: SubsetOptions) -> SubsetOptions:
    return replace(options, **{entry.name: entry.default for entry in declared(SubsetOptions) if entry.name in DRAWN})
