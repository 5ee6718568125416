"""The images of one subset: listed in a folder or a metadata file, measured, captioned, masked and placed in buckets."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import listing
from library.data.captions.files import caption_file, read_caption
from library.data.captions.metadata_files import read_metadata_file
from library.data.config import Dataset
from library.data.entries import ImageEntry
from library.data.file_index import FileIndex
from library.data.images.buckets import place
from library.data.images.files import files_in, image_endings, measure, unread_endings
from library.data.images.masks import mask_files
from library.data.images.pictures import mask_problem
from library.data.options import DataOptions, Size, SubsetOptions

logger = get_logger(__name__)
MOST_PROBLEMS = 50  # of one kind and folder; the rest is counted


class SubsetReader:
    """Reads subsets and collects what is wrong with them in `problems`."""

    def __init__(self, options: DataOptions) -> None:
        self.options = options
        self.problems: list[str] = []

    def images(self, dataset: Dataset, index: int, number: int) -> list[ImageEntry]:
        """The images of subset `number` of a dataset, by file name (of a metadata file: in its order)."""
        subset = dataset.subsets[number]
        captions = self._described(subset) if subset.metadata_file else self._captioned(subset)
        sizes = self._sizes(list(captions), subset)
        masks = self._masks(sizes, subset)
        folders = {folder: folder for folder in _by_folder(sizes)}
        return [
            ImageEntry(
                folder=folders[path.parent],
                name=path.name,
                size=sizes[path],
                placement=place(sizes[path], dataset.options),
                repeats=subset.num_repeats,
                caption=caption,
                dataset=index,
                subset=number,
                options=subset,
                mask=masks.get(path),
            )
            for path, caption in captions.items()
            if path in sizes
        ]

    def _described(self, subset: SubsetOptions) -> dict[Path, str]:
        """Images and captions of a metadata file."""
        assert subset.metadata_file is not None
        try:
            return {entry.path: entry.caption for entry in read_metadata_file(subset.metadata_file, subset.image_dir, subset)}
        except OptionError as error:
            self.problems += _shortened(error.problems)
            return {}

    def _captioned(self, subset: SubsetOptions) -> dict[Path, str]:
        """Images of a folder, and the captions beside them."""
        folder = subset.image_dir
        assert folder is not None, "the dataset file's reader asks for one of the two"
        if not folder.is_dir():
            self.problems.append(_no_folder(folder, "image_dir"))
            return {}
        files = files_in(folder)
        _tell_unread(folder)
        if not files:
            self.problems.append(f"{folder}: has no images ({', '.join(sorted(image_endings()))}) of its own")
            return {}
        captions = self._captions(files, subset)
        return {path: captions.get(path, "") for path in files}

    def _sizes(self, files: Sequence[Path], subset: SubsetOptions) -> dict[Path, Size]:
        """The sizes of the images that can be read; the others are problems, or left out with a warning."""
        to_disk = self.options.cache_latents_to_disk or self.options.cache_text_encoder_outputs_to_disk
        skips = self.options.bad_images == "skip"
        sizes: dict[Path, Size] = {}
        bad: list[str] = []
        for folder, own in _by_folder(files).items():
            index = FileIndex(folder) if to_disk or subset.cache_info else None
            measured, wrong = measure(own, whole=skips, index=index)
            sizes |= measured
            bad += wrong.values()
            if index is not None:
                index.save()
        if skips and bad:
            logger.warning("%s: %d images cannot be read and are left out:\n%s", subset.name, len(bad), "\n".join(bad))
        else:
            self.problems += bad
        return sizes

    def _masks(self, sizes: Mapping[Path, Size], subset: SubsetOptions) -> dict[Path, Path]:
        """The mask images of the images."""
        folder = subset.conditioning_data_dir
        if folder is None:
            return {}
        if not folder.is_dir():
            self.problems.append(_no_folder(folder, "conditioning_data_dir"))
            return {}
        masks, without = mask_files(folder, list(sizes))
        mask_sizes, unreadable = measure(list(masks.values()))
        shapes = [mask_problem(mask, mask_sizes[mask], image, sizes[image]) for image, mask in masks.items() if mask in mask_sizes]
        self.problems += _shortened([f"{path}: has no mask of its name in {folder} (conditioning_data_dir)" for path in without])
        self.problems += _shortened([*unreadable.values(), *filter(None, shapes)])
        return masks

    def _captions(self, files: Sequence[Path], subset: SubsetOptions) -> dict[Path, str]:
        """The captions in files, and those of images that have none."""
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
        self.problems += _shortened(bad)
        first = subset.caption_extensions[0]
        if ".txt" in endings and first != ".txt":
            logger.info("%s: captions are read from .txt files, as there are no %s files for them", subset.image_dir, first)
        captions |= self._captions_of(missing, subset, none_found=len(missing) == len(files))
        return captions

    def _captions_of(self, missing: Sequence[Path], subset: SubsetOptions, none_found: bool) -> dict[Path, str]:
        """Captions for images without a caption file: the class tokens, which may be empty, but never an empty caption unasked."""
        folder, looked_for = subset.image_dir, " or ".join(subset.caption_extensions)
        if subset.class_tokens is not None:
            if missing:
                logger.info(
                    "%s: %d images without a %s file get the class tokens '%s'", folder, len(missing), looked_for, subset.class_tokens
                )
            return dict.fromkeys(missing, subset.class_tokens)
        if none_found:
            self.problems.append(
                f"{folder}: no image has a caption file ({looked_for}); write captions, set caption_extension, or give class_tokens"
            )
        elif missing:
            names = listing(path.name for path in missing)
            self.problems.append(
                f'{folder}: {len(missing)} images have no {looked_for} file: {names}; write captions, or give class_tokens ("" for none)'
            )
        return {}


def _no_folder(path: Path, key: str) -> str:
    return f"{path}: is a file, and {key} names a folder" if path.exists() else f"{path}: no such folder ({key})"


def _tell_unread(folder: Path) -> None:
    """Name the images of kinds that are not read, and what to do about them."""
    advice = unread_endings()
    by_advice: dict[str, list[Path]] = {}
    for path in files_in(folder, advice):
        by_advice.setdefault(advice[path.suffix.lower()], []).append(path)
    for words, others in by_advice.items():
        logger.warning("%s: %d images are left out: %s (%s)", folder, len(others), listing(path.name for path in others), words)


def _by_folder(files: Iterable[Path]) -> dict[Path, list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    return folders


def _shortened(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MOST_PROBLEMS
    return [*problems[:MOST_PROBLEMS], f"... and {more} more like these"] if more > 0 else list(problems)
