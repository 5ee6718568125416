"""The images of the datasets: found, measured, captioned and placed in buckets, with everything wrong with them said at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import listing
from library.data.buckets import Placement, place
from library.data.captions import caption_file, read_caption
from library.data.config import Dataset
from library.data.images import OTHER_IMAGE_ENDINGS, files_in, read_size
from library.data.options import Size, SubsetOptions

logger = get_logger(__name__)
MOST_PROBLEMS = 50  # of one kind and folder; the rest is counted


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image of a dataset, as the run will use it."""

    path: Path
    size: Size  # as shown, before resizing
    placement: Placement
    repeats: int  # uses in an epoch
    caption: str  # as read; several lines where wildcards draw one
    dataset: int
    subset: int  # index within its dataset
    options: SubsetOptions


def find_images(datasets: Sequence[Dataset]) -> list[ImageEntry]:
    """The images of all datasets, by dataset, subset and file name.

    Raises `OptionError` with every missing or empty folder, unreadable image and bad caption file.
    """
    images: list[ImageEntry] = []
    problems: list[str] = []
    for index, dataset in enumerate(datasets):
        found = []
        for number, subset in enumerate(dataset.subsets):
            found += _subset_images(dataset, subset, index, number, problems)
        if found and all(image.options.is_reg for image in found):
            problems.append(f"{found[0].path.parent}: the dataset has regularisation images only; add a subset to train on")
            continue
        images += balanced(found)
    if problems:
        raise OptionError(problems)
    return images


def balanced(images: list[ImageEntry]) -> list[ImageEntry]:
    """The images of one dataset with the repeats of regularisation images raised, one after the other, to match the others.

    As sd-scripts does: once they are as many as the training images, further regularisation images are not used.
    """
    wanted = sum(image.repeats for image in images if not image.options.is_reg)
    regular = [image for image in images if image.options.is_reg]
    if not regular:
        return images
    uses = list(accumulate(image.repeats for image in regular))
    kept = next((number for number, total in enumerate(uses, 1) if total >= wanted), len(regular))
    if kept < len(regular):
        logger.warning(
            "%d of %d regularisation images are not used: an epoch has %d training images", len(regular) - kept, len(regular), wanted
        )
    rounds, rest = divmod(max(0, wanted - uses[kept - 1]), kept)
    matched = [replace(image, repeats=image.repeats + rounds + (number < rest)) for number, image in enumerate(regular[:kept])]
    return [image for image in images if not image.options.is_reg] + matched


# One subset


def _subset_images(dataset: Dataset, subset: SubsetOptions, index: int, number: int, problems: list[str]) -> list[ImageEntry]:
    folder = subset.image_dir
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder (image_dir)" if not folder.exists() else f"{folder}: is not a folder (image_dir)")
        return []
    files = files_in(folder)
    others = files_in(folder, OTHER_IMAGE_ENDINGS)
    if others:
        logger.warning(
            "%s: %d images of kinds that this version does not read are left out: %s",
            folder,
            len(others),
            listing(path.name for path in others),
        )
    if not files:
        problems.append(f"{folder}: has no images (.jpg, .png, .webp, .bmp) of its own")
        return []
    sizes = _sizes(files, problems)
    captions = _captions(files, subset, problems)
    return [
        ImageEntry(
            path=path,
            size=sizes[path],
            placement=place(sizes[path], dataset.options),
            repeats=subset.num_repeats,
            caption=captions.get(path, ""),
            dataset=index,
            subset=number,
            options=subset,
        )
        for path in files
        if path in sizes
    ]


def _sizes(files: list[Path], problems: list[str]) -> dict[Path, Size]:
    sizes: dict[Path, Size] = {}
    bad: list[str] = []
    for path in files:
        try:
            sizes[path] = read_size(path)
        except ValueError as error:
            bad.append(str(error))
    problems += _shortened(bad)
    return sizes


def _captions(files: list[Path], subset: SubsetOptions, problems: list[str]) -> dict[Path, str]:
    """The captions of a subset's images. An image is left without one only when others have theirs, and never in silence."""
    captions: dict[Path, str] = {}
    bad: list[str] = []
    missing: list[Path] = []
    endings: set[str] = set()
    for path in files:
        beside = caption_file(path, subset.caption_extensions)
        if beside is None:
            missing.append(path)
            continue
        endings.add(beside.suffix)
        try:
            captions[path] = read_caption(beside, subset.enable_wildcard)
        except ValueError as error:
            bad.append(str(error))
    problems += _shortened(bad)
    if ".txt" in endings and subset.caption_extensions[0] != ".txt":
        logger.info(
            "%s: captions are read from .txt files, as there are no %s files for them", subset.image_dir, subset.caption_extensions[0]
        )
    captions |= _captions_of(missing, subset, problems, none_found=len(missing) == len(files))
    return captions


def _captions_of(missing: list[Path], subset: SubsetOptions, problems: list[str], none_found: bool) -> dict[Path, str]:
    """Captions for images without a caption file."""
    looked_for = " or ".join(subset.caption_extensions)
    if subset.class_tokens:
        if missing:
            logger.info(
                "%s: %d images without a %s file get the class tokens '%s'", subset.image_dir, len(missing), looked_for, subset.class_tokens
            )
        return dict.fromkeys(missing, subset.class_tokens)
    if none_found:
        problems.append(
            f"{subset.image_dir}: no image has a caption file ({looked_for}); write captions, set caption_extension, or give class_tokens"
        )
    elif missing:
        names = listing(path.name for path in missing)
        logger.warning("%s: %d images have no %s file and get an empty caption: %s", subset.image_dir, len(missing), looked_for, names)
    return {}


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - MOST_PROBLEMS
    return [*problems[:MOST_PROBLEMS], f"... and {more} more like these"] if more > 0 else problems
