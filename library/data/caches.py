"""Caches of latents and text states: encoded once before training, kept in memory or on disk, read batch by batch.

On disk an entry is one safetensors file in the folder `.hadron_cache` beside the images, named by its key: a hash of all that
the entry depends on (image bytes, resizing, crop, mirroring, preprocessing and model; for text the caption as encoded, and the
model). What changes gets another key and is encoded anew; a broken file is replaced. The folder may be deleted at any time.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import listing, load_tensors, read_header, save_tensors
from library.data.captions import fixed_caption
from library.data.dataset import TrainingData, latent_cache_problems, text_cache_problems
from library.data.entries import ImageEntry
from library.data.images import PREPROCESSING, load_pixels
from library.data.options import Size

logger = get_logger(__name__)
FOLDER = ".hadron_cache"
FORMAT = 1  # raise it when the content of entries changes
EncodeImages = Callable[[Tensor], Tensor]
EncodeText = Callable[[list[str]], dict[str, Tensor]]


Item = TypeVar("Item", bound=Hashable)
Picture = tuple[int, bool]
"""The index of an image, and whether it is mirrored."""


@dataclass
class CachedLatents:
    """Latents by picture, in memory or as files."""

    kept: dict[Picture, Tensor] = field(default_factory=dict)
    files: dict[Picture, Path] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        """Is nothing read from files?"""
        return not self.files

    def latents(self, image: int, flipped: bool) -> Tensor:
        """Latents (channels, height / 8, width / 8) float32 of one image, or of its mirror image."""
        picture = image, flipped
        return self.kept[picture] if picture in self.kept else load_tensors(self.files[picture])["latents"]


@dataclass
class CachedText:
    """Text states by caption, in memory or as files."""

    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def states(self, caption: str) -> dict[str, Tensor]:
        """The states of one caption, without the batch dimension."""
        return self.kept[caption] if caption in self.kept else load_tensors(self.files[caption])


def fill_latents(data: TrainingData, encode: EncodeImages, *, identity: str, to_disk: bool, batch_size: int) -> None:
    """Encode every image (and its mirror image where `flip_aug` is on) and let `data` give latents instead of pixels.

    `encode` maps pixels (batch, 3, height, width) in [-1, 1] to latents; `identity` changes whenever its results would.
    Raises `ValueError` for options that need pixels, an image that cannot be decoded, latents that are not finite, or a
    folder that cannot be written to.
    """
    _refuse(latent_cache_problems(data.datasets))
    pictures = [(index, flipped) for index, image in enumerate(data.images) for flipped in _sides(image)]
    store = CachedLatents()
    if to_disk:
        hashes = {image.path: _file_hash(image.path) for image in data.images}
        for index, flipped in pictures:
            image = data.images[index]
            store.files[index, flipped] = _place(image, "latents", _latent_key(image, flipped, hashes[image.path], identity))
    missing = _missing(pictures, store.files, "latents")
    for chunk in _of_one_size(data, missing, batch_size):
        for picture, latents in zip(chunk, _encoded(data, chunk, encode), strict=True):
            if to_disk:
                save_tensors(store.files[picture], {"latents": latents}, {"image": data.images[picture[0]].path.name})
            else:
                store.kept[picture] = latents
    data.latents = store


def fill_text(data: TrainingData, encode: EncodeText, *, identity: str, to_disk: bool, batch_size: int) -> None:
    """Encode every caption as the model shall read it (and the empty one where captions are dropped) and let `data` give its states.

    `encode` maps captions to tensors with the batch in dimension 0; `identity` changes whenever its results would.
    Raises `ValueError` for options that make captions differ from use to use, or a folder that cannot be written to.
    """
    _refuse(text_cache_problems(data.datasets))
    first_image = _captions(data)
    store = CachedText()
    if to_disk:
        store.files = {caption: _place(image, "text", _key(caption=caption, model=identity)) for caption, image in first_image.items()}
    missing = _missing(list(first_image), store.files, "text")
    for start in range(0, len(missing), batch_size):
        captions = missing[start : start + batch_size]
        states = {name: tensor.detach().to("cpu", copy=True) for name, tensor in encode(captions).items()}
        for row, caption in enumerate(captions):
            own = {name: tensor[row].clone() for name, tensor in states.items()}
            if to_disk:
                save_tensors(store.files[caption], own, {"caption": caption})
            else:
                store.kept[caption] = own
    data.text = store


# Entries


def _missing(wanted: list[Item], files: Mapping[Item, Path], kind: str) -> list[Item]:
    """What has no sound entry yet; the counts are logged."""
    states = {item: _entry_state(files[item]) if item in files else "missing" for item in wanted}
    missing = [item for item in wanted if states[item] != "found"]
    found, broken = len(wanted) - len(missing), sum(state == "broken" for state in states.values())
    replaced = f", of which {broken} replace a broken entry" if broken else ""
    logger.info("%s: %d in the cache, %d to encode%s", kind, found, len(missing), replaced)
    return missing


def _entry_state(path: Path) -> str:
    """`found`, `missing` or `broken` (cut short, or not a tensor file)."""
    if not path.is_file():
        return "missing"
    try:
        return "found" if read_header(path).tensors else "broken"
    except ValueError:
        return "broken"


def _place(image: ImageEntry, kind: str, key: str) -> Path:
    return image.path.parent / FOLDER / f"{kind}-{key}.safetensors"


def _key(**parts: object) -> str:
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def _latent_key(image: ImageEntry, flipped: bool, image_hash: str, identity: str) -> str:
    place = image.placement
    return _key(
        image=image_hash,
        resized=place.resized,
        bucket=place.bucket,
        corner=place.centre,
        flipped=flipped,
        preprocessing=PREPROCESSING,
        model=identity,
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse(problems: list[str]) -> None:
    if problems:
        raise OptionError(problems)


# Images


def _sides(image: ImageEntry) -> tuple[bool, ...]:
    return (False, True) if image.options.flip_aug else (False,)


def _of_one_size(data: TrainingData, pictures: list[Picture], most: int) -> Iterator[list[Picture]]:
    """The pictures in groups of at most `most` that share a bucket."""
    buckets: dict[Size, list[Picture]] = {}
    for picture in pictures:
        buckets.setdefault(data.images[picture[0]].placement.bucket, []).append(picture)
    for group in buckets.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))


def _encoded(data: TrainingData, pictures: list[Picture], encode: EncodeImages) -> list[Tensor]:
    """The latents of pictures of one size, float32 on the CPU."""
    images = [data.images[index] for index, _ in pictures]
    sides = [flipped for _, flipped in pictures]
    pixels = [load_pixels(image.path, image.placement, image.placement.centre, side) for image, side in zip(images, sides, strict=True)]
    latents = encode(torch.stack(pixels)).detach().to("cpu", torch.float32, copy=True)
    bad = [str(image.path) for image, row in zip(images, latents, strict=True) if not row.isfinite().all()]
    if bad:
        raise ValueError(f"the VAE gives latents that are not finite for {listing(bad)}; use --no_half_vae, or another --vae")
    return [row.clone() for row in latents]


# Captions


def _captions(data: TrainingData) -> dict[str, ImageEntry]:
    """Every caption that the model will read, with the first image that has it."""
    captions: dict[str, ImageEntry] = {}
    for image in data.images:
        captions.setdefault(fixed_caption(image.caption, image.options), image)
        if image.options.drops_captions:
            captions.setdefault("", image)
    return captions
