"""Caches that sd-scripts left beside the images: `.npz` files of latents and of text states, read and never written.

Such a file names neither the model nor the image it was made from. It is used where all that it does say fits, and where neither its
image nor its caption is newer; `latents.py` and `text.py` besides encode one anew and compare.
"""

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.core.log import get_logger, warn_once
from library.core.tensor_file import is_finite, listing
from library.data.batch import TextStates
from library.data.captions.files import caption_file
from library.data.entries import ImageEntry
from library.data.images.files import is_stored_upright
from library.data.options import Size

logger = get_logger(__name__)
Arrays = Mapping[str, np.ndarray]
_BROKEN = (OSError, ValueError, EOFError, KeyError, RuntimeError, OverflowError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class NpzLatents:
    """How sd-scripts names a family's latents, `<stem>_<width>x<height><suffix>`, and what makes them ready for the model."""

    suffix: str
    channels: int
    pixels: int  # side of the square of pixels behind one latent position
    ready: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class NpzText:
    """How sd-scripts names a family's text states, `<stem><suffix>`, and what makes them ready for the model."""

    suffix: str
    shapes: Mapping[str, tuple[int, ...]]  # of the arrays that a file must hold
    ready: Callable[[Arrays], TextStates]  # the states of one caption, without the batch dimension
    problem: Callable[[Arrays], str | None] | None = None  # why a file of the right shapes does not serve, if anything


def identical(latents: Tensor) -> Tensor:
    """Latents that are stored as the model wants them."""
    return latents


class NpzNames(NamedTuple):
    """The names of one picture's arrays in its image's file."""

    latents: str
    mask: str | None


Picture = tuple[int, bool]
"""The index of an image, and whether it is mirrored."""


# Latents


def latents_file(image: ImageEntry, npz: NpzLatents) -> Path:
    """Where sd-scripts keeps the latents of an image: its name and its own size."""
    width, height = image.size
    return image.path.with_name(f"{image.path.stem}_{width:04d}x{height:04d}{npz.suffix}")


def find_latents(images: Sequence[ImageEntry], pictures: Iterable[Picture], npz: NpzLatents) -> dict[Picture, NpzNames]:
    """The pictures whose latents stand in sd-scripts' files; why others are not used is logged by reason and count."""
    folders = _Folders(image.folder for image in images)
    found: dict[Picture, NpzNames] = {}
    shared: dict[NpzNames, NpzNames] = {}  # most have the same
    reasons: Counter[str] = Counter()
    for index, flipped in pictures:
        image = images[index]
        written = folders.written(path := latents_file(image, npz))
        if written is None:
            continue
        try:
            answer = _latent_names(path, written, image, flipped, npz)
        except _BROKEN as error:
            answer = f"not readable ({type(error).__name__})"
        if isinstance(answer, str):
            reasons[answer] += 1
        else:
            found[index, flipped] = shared.setdefault(answer, answer)
    _tell("latents", reasons)
    if nameless := [image.path.stem for image in images if folders.written(image.path.with_suffix(".npz")) is not None]:
        warn_once(logger, f"{len(nameless)} files such as {nameless[0]}.npz are not used: their name does not say which VAE made them")
    return found


def read_latents(image: ImageEntry, names: NpzNames, npz: NpzLatents, flipped: bool) -> tuple[Tensor, Tensor | None]:
    """Latents (channels, h, w) float32, ready for the model, and the mask (H, W) as stored. Raises `ValueError` for a damaged file."""
    with _opened(latents_file(image, npz)) as arrays:
        latents = npz.ready(torch.from_numpy(arrays[names.latents].astype(np.float32)))
        mask = None if names.mask is None else torch.from_numpy(arrays[names.mask].astype(np.float32))
        if not is_finite(latents):
            raise ValueError("its latents are not finite")
    return latents, mask.flip(1) if mask is not None and flipped else mask


def _latent_names(path: Path, written: int, image: ImageEntry, flipped: bool, npz: NpzLatents) -> NpzNames | str:
    """The names of a picture's arrays, or why the file is not used."""
    if image.path.stat().st_mtime_ns > written:
        return "older than their image"
    if image.mask is not None:
        return "without the mask of conditioning_data_dir"
    if not is_stored_upright(image.path):  # sd-scripts knows no EXIF orientation
        return "made from an image that lies on its side or its head"
    width, height = (side // npz.pixels for side in image.placement.bucket)
    with zipfile.ZipFile(path) as file:
        stored = set(file.namelist())

        def key(name: str, *shapes: tuple[int, ...]) -> str | None:
            own = (candidate for candidate in (f"{name}_{height}x{width}", name) if f"{candidate}.npy" in stored)
            return next((candidate for candidate in own if _shape(file, candidate) in shapes), None)

        latents = key("latents_flipped" if flipped else "latents", (npz.channels, height, width))
        if latents is None:
            return "without mirrored latents of this size" if flipped else "without latents of this size"
        size = key("original_size", (2,))
        if size is None or _small(file, size) != image.size:
            return "made from an image of another size"
        mask = key("alpha_mask", (height, width), image.placement.bucket[::-1]) if image.options.alpha_mask else None
        if image.options.alpha_mask and mask is None:
            return "without an alpha mask of this size"
    return NpzNames(latents, mask)


# Text


def find_text(captions: Mapping[str, ImageEntry], npz: NpzText) -> dict[str, Path]:
    """The files of captions in sd-scripts' cache; why others are not used is logged by reason and count."""
    folders = _Folders(image.folder for image in captions.values())
    found: dict[str, Path] = {}
    reasons: Counter[str] = Counter()
    for caption, image in captions.items():
        path = image.path.with_name(f"{image.path.stem}{npz.suffix}")
        written = folders.written(path)
        if written is None or not caption:  # the empty caption is no image's own
            continue
        try:
            reason = _text_problem(path, written, caption, image, npz)
        except _BROKEN as error:
            reason = f"not readable ({type(error).__name__})"
        if reason is None:
            found[caption] = path
        else:
            reasons[reason] += 1
    _tell("text", reasons)
    return found


def read_text(path: Path, npz: NpzText) -> TextStates:
    """The states of one caption, without the batch dimension. Raises `ValueError` for a damaged file."""
    with _opened(path) as arrays:
        states = npz.ready(arrays)
        if bad := [name for name, state in states.items() if not is_finite(state)]:
            raise ValueError(f"its {listing(bad)} are not finite")
        return states


def _text_problem(path: Path, written: int, caption: str, image: ImageEntry, npz: NpzText) -> str | None:
    if caption != image.caption:
        return "made from the caption without prefix, suffix, wildcards or separators"
    source = image.options.metadata_file or caption_file(image.path, image.options.caption_extensions)
    if source is None:
        return "without a caption file to compare their date with"
    if source.stat().st_mtime_ns > written:
        return "older than their caption"
    with zipfile.ZipFile(path) as file:
        stored = set(file.namelist())
        for name, shape in npz.shapes.items():
            if f"{name}.npy" not in stored or _shape(file, name) != shape:
                return f"without {name} of shape {'x'.join(map(str, shape))}, as --max_token_length and the model want it"
    if npz.problem is None:
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return npz.problem(arrays)


# Files


class _Folders:
    """When the `.npz` files of some folders were written, each folder listed once."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._times: dict[Path, dict[str, int]] = {}
        for folder in set(folders):
            times = self._times[folder] = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".npz"):
                        with suppress(FileNotFoundError):  # a link to nothing, or a file removed just now
                            times[entry.name] = entry.stat().st_mtime_ns

    def written(self, path: Path) -> int | None:
        """The time in nanoseconds, or None for a file that is not there."""
        return self._times[path.parent].get(path.name)


@contextmanager
def _opened(path: Path) -> Iterator[Arrays]:
    """The arrays of a file, each read when asked for. Raises `ValueError` naming a file that is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except _BROKEN as error:
        raise ValueError(
            f"{path}: this file of sd-scripts' cache is damaged ({error}); delete it, and the next start encodes it anew"
        ) from error


def _shape(file: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of an array, by its header. Raises `ValueError` for one that does not hold numbers."""
    with file.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} is of type {dtype}")
    return shape


def _small(file: zipfile.ZipFile, name: str) -> Size:
    with file.open(f"{name}.npy") as stream:
        first, second = np.lib.format.read_array(stream, allow_pickle=False).tolist()
        return int(first), int(second)


def _tell(what: str, reasons: Counter[str]) -> None:
    if reasons:
        said = listing(f"{count} {reason}" for reason, count in reasons.most_common())
        logger.info("%s: files of sd-scripts that are not used and will be encoded anew: %s", what, said)
