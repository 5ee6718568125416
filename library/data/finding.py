"""The images of all datasets: found, held out for validation, left out where too small, and balanced."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from library.core.log import get_logger
from library.core.options import OptionError
from library.data.config import Dataset
from library.data.entries import ImageEntry, balanced, for_validation
from library.data.options import DataOptions, SubsetOptions, as_size
from library.data.split import split
from library.data.subset_images import SubsetReader

logger = get_logger(__name__)


class Images(NamedTuple):
    """The images to train with (those of regularisation among them), and those to validate with."""

    training: list[ImageEntry]
    validation: list[ImageEntry]


def find_images(datasets: Sequence[Dataset], options: DataOptions, seed: int) -> Images:
    """The images of all datasets, by dataset, subset and file name; `seed` draws what is held out where no `validation_seed` does.

    An image held out for validation by one dataset is trained on by none. Raises `OptionError` with every missing or empty folder,
    unreadable image, bad caption or metadata file, and missing mask.
    """
    reader = SubsetReader(options)
    training: list[ImageEntry] = []
    validation: list[ImageEntry] = []
    for index, dataset in enumerate(datasets):
        for number, subset in enumerate(dataset.subsets):
            found = reader.images(dataset, index, number)
            held_out = _held_out(found, subset, seed)
            for image in _large_enough(found, dataset, subset):
                (validation if image.path in held_out else training).append(image)
    if reader.problems:
        raise OptionError(dict.fromkeys(reader.problems))
    training = _never_held_out(training, validation)
    chosen: list[ImageEntry] = []
    for index in range(len(datasets)):
        own = [image for image in training if image.dataset == index]
        if own and all(image.options.is_reg for image in own):
            reader.problems.append(f"{own[0].folder}: the dataset has regularisation images only; add a subset to train on")
        chosen += balanced(own)
    if not chosen and not reader.problems:
        reader.problems.append("no image is left to train on: all are held out for validation, too small, or unreadable")
    if reader.problems:
        raise OptionError(dict.fromkeys(reader.problems))
    return Images(chosen, for_validation(validation))


def _held_out(images: Sequence[ImageEntry], subset: SubsetOptions, seed: int) -> set[Path]:
    """The images of a subset that are for validation: all, none, or a share drawn by name."""
    if subset.is_validation:
        return {image.path for image in images}
    if subset.is_reg or not subset.validation_split:
        return set()
    names = {os.path.relpath(image.path, subset.image_dir) if subset.image_dir else str(image.path): image.path for image in images}
    chosen = split(list(names), subset.validation_split, seed if subset.validation_seed is None else subset.validation_seed)
    return {names[name] for name in chosen}


def _large_enough(images: Sequence[ImageEntry], dataset: Dataset, subset: SubsetOptions) -> list[ImageEntry]:
    """The images with more pixels than `skip_image_resolution`; how many have not is logged."""
    limit = dataset.options.skip_image_resolution
    if limit is None:
        return list(images)
    width, height = as_size(limit)
    kept = [image for image in images if image.size[0] * image.size[1] > width * height]
    if len(kept) < len(images):
        left_out = len(images) - len(kept)
        logger.info("%s: %d images of at most %dx%d pixels are left out (skip_image_resolution)", subset.name, left_out, width, height)
    return kept


def _never_held_out(training: Sequence[ImageEntry], validation: Sequence[ImageEntry]) -> list[ImageEntry]:
    """The training images without those that another subset holds out: the same file, however it is spelled or linked to."""
    if not validation:
        return list(training)
    folders = {folder: os.path.realpath(folder) for folder in {image.folder for image in [*training, *validation]}}

    def place(image: ImageEntry) -> tuple[str, str]:
        return os.path.split(os.path.realpath(image.path)) if image.path.is_symlink() else (folders[image.folder], image.name)

    held_out = {place(image) for image in validation}
    kept = [image for image in training if place(image) not in held_out]
    if len(kept) < len(training):
        left_out = sum(image.repeats for image in training) - sum(image.repeats for image in kept)
        logger.info("%d uses of images are left out of training: another dataset or subset holds them out for validation", left_out)
    return kept
