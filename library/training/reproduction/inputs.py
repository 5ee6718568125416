"""The inputs of a run, each with a digest that is cheap to take: model files, adapter files, the dataset file, images, captions."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.command_line import OptionSet
from library.core.file_hash import sampled_file_hash
from library.core.options import declared
from library.data.dataset import TrainingData
from library.data.entries import ImageEntry
from library.models.architecture import Architecture

FILES = ("dataset_config", "in_json", "network_weights", "base_weights", "sample_prompts")
"""Options, besides those that name the model's files, whose files decide what a run does."""

NO_INPUTS = ("tokenizer_cache_dir",)
"""Options that name the model's files and may change: what is found there counts with the text."""

TEXT, IMAGES = "text", "images"
PIECE = 4096  # bytes at the start, in the middle and at the end of an image that are looked at
THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: where it is, how much it is, and its digest (SHA-256, over samples of large files)."""

    place: str
    digest: str
    bytes: int | None = None  # of files
    images: int | None = None  # of folders of images


def inputs_of(arch: Architecture, options: OptionSet, data: TrainingData) -> dict[str, Input]:
    """Every input by the name that `--allow_reproduce_mismatch` takes: an option, `text`, or `images` (then which of them).

    `text` stands for text encoders, tokenizers and the length of captions together. Raises `ValueError` for files that cannot be read.
    """
    try:
        found = dict(_files(arch, options))
        found[TEXT] = Input(place="text encoders and tokenizers", digest=arch.text_identity(options[arch.ModelOptions]))
        return found | dict(_folders(data))
    except OSError as error:
        raise ValueError(f"{error.filename or 'an input'}: cannot be read ({error.strerror or error})") from error


def _files(arch: Architecture, options: OptionSet) -> Iterator[tuple[str, Input]]:
    values = options.values()
    names = [entry.name for entry in declared(arch.ModelOptions) if entry.name not in NO_INPUTS]
    for name in (*names, *FILES):
        given = values.get(name)
        paths = [Path(each) for each in (given if isinstance(given, tuple) else (given,)) if isinstance(each, str | Path) and str(each)]
        for number, path in enumerate(paths, 1):
            if path.exists():
                yield (name if len(paths) == 1 else f"{name}:{number}"), _file_or_folder(path)


def _file_or_folder(path: Path) -> Input:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {sampled_file_hash(file)}\n".encode("utf-8", "backslashreplace"))
    total = sum(file.stat().st_size for file in files)
    return Input(place=str(path), digest=sampled_file_hash(path) if path.is_file() else digest.hexdigest(), bytes=total)


# Images


def _folders(data: TrainingData) -> Iterator[tuple[str, Input]]:
    """An input for each folder of images or metadata file, training and validation apart."""
    sources = {"": data} | ({"validation ": data.validation} if data.validation is not None else {})
    for role, source in sources.items():
        folders: dict[tuple[int, int], list[ImageEntry]] = defaultdict(list)
        for image in source.images:
            folders[image.dataset, image.subset].append(image)
        for (dataset, subset), own in sorted(folders.items()):
            name = f"{IMAGES}:{role}{dataset + 1}.{subset + 1}"
            place = source.datasets[dataset].subsets[subset].name
            yield name, Input(place=place, images=len(own), digest=_images_digest(own))


def _images_digest(images: Sequence[ImageEntry]) -> str:
    """Over names, contents, captions, masks, repeats and places of images, in their order."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        lines = pool.map(_image_line, images)
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _image_line(image: ImageEntry) -> str:
    mask = None if image.mask is None else _pieces(image.mask)
    facts: tuple[Any, ...] = (image.name, _pieces(image.path), image.size, image.placement, image.repeats, image.caption, mask)
    return "\n".join(map(repr, facts)) + "\n\n"


def _pieces(path: Path) -> str:
    """SHA-256 of a file's length and of its start, middle and end: sees every other picture, not every changed byte."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode("ascii"))
    with path.open("rb") as file:
        for place in dict.fromkeys((0, max(0, size // 2 - PIECE // 2), max(0, size - PIECE))):
            file.seek(place)
            digest.update(file.read(PIECE))
    return digest.hexdigest()
