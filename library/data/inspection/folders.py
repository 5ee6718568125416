"""What lies in the folders of the data and is not read: other kinds of files, captions and masks without an image, subfolders."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from library.data.captions.files import caption_file
from library.data.dataset import TrainingData
from library.data.images.files import files_in, image_endings, unread_endings
from library.data.images.masks import mask_files
from library.data.inspection.findings import Finding, finding
from library.data.options import SubsetOptions

SHOWN = 10
MOST_FOLDERS = 2000  # subfolders that are looked into


def folder_findings(data: TrainingData) -> Iterator[Finding]:
    """What is left out of each folder that the datasets name, each folder once."""
    known: set[Path] = set()
    named = {subset.image_dir.resolve() for dataset in data.datasets for subset in dataset.subsets if subset.image_dir}
    for dataset in data.datasets:
        for subset in dataset.subsets:
            folder = subset.image_dir
            if folder is None or folder.resolve() in known or not folder.is_dir():
                continue
            known.add(folder.resolve())
            if subset.metadata_file is None:
                yield from _unread_images(folder)
                yield from _unread_captions(folder, subset)
                yield from _subfolders(folder, named)
            yield from _unused_masks(folder, subset)


def _unread_images(folder: Path) -> Iterator[Finding]:
    for ending, advice in unread_endings().items():
        if files := files_in(folder, {ending}):
            text = f"{folder}: {ending} images, which are not read here: {len(files)}; {advice}"
            yield finding("warning", "unread", text, (path.name for path in files[:SHOWN]))


def _unread_captions(folder: Path, subset: SubsetOptions) -> Iterator[Finding]:
    images = files_in(folder)
    endings = subset.caption_extensions
    read = {path for image in images if (path := caption_file(image, endings)) is not None}
    unread = [path.name for path in files_in(folder, frozenset(ending.lower() for ending in endings)) if path not in read]
    if unread:
        text = f"{folder}: caption files of no image, or not read as another ending comes first: {len(unread)}"
        yield finding("warning", "unread", text, unread[:SHOWN])


def _unused_masks(folder: Path, subset: SubsetOptions) -> Iterator[Finding]:
    if subset.conditioning_data_dir is None or not subset.conditioning_data_dir.is_dir():
        return
    used = set(mask_files(subset.conditioning_data_dir, files_in(folder))[0].values())
    unused = [path.name for path in files_in(subset.conditioning_data_dir) if path not in used]
    if unused:
        text = f"{subset.conditioning_data_dir}: masks of no image in {folder}: {len(unused)}"
        yield finding("warning", "unread", text, unused[:SHOWN])


def _subfolders(folder: Path, named: set[Path]) -> Iterator[Finding]:
    """The folders inside with images that no subset names."""
    found: dict[str, int] = {}
    endings = image_endings()
    for number, (inner, folders, files) in enumerate(os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        path = Path(inner)
        if number >= MOST_FOLDERS:
            break
        if path != folder and path.resolve() not in named and (count := _images_among(files, endings)):
            found[str(path.relative_to(folder))] = count
    if found:
        text = f"{folder}: images in folders inside it, which are not read: {sum(found.values())}; name each folder in a subset"
        yield finding("warning", "unread", text, (f"{name}: {count}" for name, count in list(found.items())[:SHOWN]))


def _images_among(names: Sequence[str], endings: Collection[str]) -> int:
    return sum(os.path.splitext(name)[1].lower() in endings and not name.startswith(".") for name in names)
