"""The cache of latents: every image, and its mirror image where it is flipped, encoded once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import is_finite, listing
from library.data.cacheable import latent_problems
from library.data.caches.entries import KEY_BYTES, clean, entry_path, is_wanted, key_of, read_entry, states, write_entry
from library.data.caches.npz import NpzLatents, NpzNames, Picture, find_latents, latents_file, read_latents
from library.data.caches.rounds import Shard, each, in_turn, kept_behind, loaded_ahead, told
from library.data.dataset import Latents, TrainingData
from library.data.entries import ImageEntry
from library.data.file_index import FileIndex
from library.data.images.crops import centre_crop
from library.data.images.masks import pooled_mask
from library.data.images.pictures import PREPROCESSING, load_picture
from library.data.images.pictures import Picture as Pixels
from library.data.options import Size

logger = get_logger(__name__)
KIND = "latents"
MOST_DIFFERENCE = 0.5  # of sd-scripts' latents from ours, by their norm: those of another VAE are beyond 1, half precision is below 0.1
EncodeImages = Callable[[Tensor], Tensor]


@dataclass
class CachedLatents:
    """Latents by picture: in memory, in files of ours, or in files of sd-scripts.

    Of an entry on disk only its key is kept, 16 bytes a picture; its file is named by that and by its image's folder.
    """

    images: Sequence[ImageEntry]
    kept: dict[Picture, Latents] = field(default_factory=dict)
    keys: dict[bool, bytes] = field(default_factory=dict)  # of all images one after the other, by whether they are mirrored
    npz: NpzLatents | None = None
    places: dict[Picture, NpzNames] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        """Is nothing read from files?"""
        return not self.keys

    def latents(self, image: int, flipped: bool) -> Latents:
        """What was cached of one image, or of its mirror image. Raises `ValueError` for an entry that is damaged."""
        picture = image, flipped
        if picture in self.kept:
            return self.kept[picture]
        if picture in self.places:
            assert self.npz is not None
            return _at_one_size(*read_latents(self.images[image], self.places[picture], self.npz, flipped))
        tensors = read_entry(self.path(picture)).tensors
        return Latents(tensors["latents"], tensors.get("mask"))

    def path(self, picture: Picture) -> Path:
        """The file of a picture's own entry."""
        index, flipped = picture
        key = self.keys[flipped][index * KEY_BYTES : (index + 1) * KEY_BYTES]
        return entry_path(self.images[index].folder, KIND, key)


def fill_latents(
    data: TrainingData,
    encode: EncodeImages,
    *,
    identity: str,
    to_disk: bool,
    batch_size: int,
    shard: Shard = (0, 1),
    npz: NpzLatents | None = None,
) -> None:
    """Encode every image (and its mirror image where `flip_aug` is on) and let `data` give latents instead of pixels.

    `encode` maps pixels (batch, 3, height, width) in [-1, 1] to latents; `identity` changes whenever its results would. On disk the
    processes of `shard` share the work, and what `npz` finds of sd-scripts' beside the images is used in place.
    Raises `ValueError` for options that need pixels, for all images that cannot be decoded, for latents that are not finite, and for a
    folder that cannot be written to.
    """
    if problems := latent_problems(data.datasets):
        raise OptionError(problems)
    for part, what in ((data, KIND), (data.validation, f"validation {KIND}")):
        if part is not None:
            filling = _Filling(part, encode, batch_size, shard if to_disk else (0, 1), what)
            part.latents = filling.on_disk(identity, npz) if to_disk else filling.in_memory()


@dataclass
class _Filling:
    """One filling of the cache of some images."""

    data: TrainingData
    encode: EncodeImages
    batch_size: int
    shard: Shard
    what: str
    broken: list[str] = field(default_factory=list)  # images that cannot be decoded

    def in_memory(self) -> CachedLatents:
        store = CachedLatents(self.data.images)
        self._encode(self._pictures(), store.kept.__setitem__, lambda picture: picture not in store.kept)
        return store

    def on_disk(self, identity: str, npz: NpzLatents | None) -> CachedLatents:
        images, pictures = self.data.images, self._pictures()
        store = CachedLatents(images, keys=_keys(images, identity), npz=npz)
        clean({image.folder for image in images})
        found = states((store.path(picture) for picture in pictures), check=not self.data.options.skip_cache_check)
        missing = [picture for picture, state in zip(pictures, found, strict=True) if state == "missing"]
        if npz is not None and missing:
            store.places = self._agreeing(find_latents(images, missing, npz), npz)
        broken = {picture for picture, state in zip(pictures, found, strict=True) if state == "broken"}
        to_encode = [picture for picture in missing if picture not in store.places] + sorted(broken)
        logger.info(
            "%s: %d in the cache%s, %d to encode%s",
            self.what,
            found.count("found"),
            f", {len(store.places)} in files of sd-scripts" if store.places else "",
            len(to_encode),
            f", of which {len(broken)} replace a broken entry" if broken else "",
        )
        self._encode(to_encode, partial(_write, store), lambda picture: is_wanted(store.path(picture), check=picture in broken))
        return store

    def _pictures(self) -> list[Picture]:
        return [
            (index, side)
            for index, image in enumerate(self.data.images)
            for side in ((False, True) if image.options.flip_aug else (False,))
        ]

    def _encode(self, pictures: Sequence[Picture], keep: Callable[[Picture, Latents], None], wanted: Callable[[Picture], bool]) -> None:
        """Encode pictures and keep their latents; those not `wanted` any more when their turn comes were encoded by another process."""
        chunks = in_turn(list(_of_one_size(self.data.images, pictures, self.batch_size)), self.shard)
        with kept_behind(keep) as keep_later, told(self.what, len(pictures), self.shard[0] == 0) as done:
            for loaded in loaded_ahead(chunks, self._load, wanted):
                ready = [(picture, pixels) for picture, pixels in loaded.items if pixels is not None and wanted(picture)]
                for picture, latents in self._encoded(ready):
                    keep_later(picture, latents)
                done(loaded.asked, len(ready))
        if self.broken:
            raise ValueError("\n".join(sorted(set(self.broken))))

    def _load(self, picture: Picture) -> Pixels | None:
        """The pixels of a picture; None for one that cannot be decoded, which is noted."""
        try:
            return _pixels(self.data.images[picture[0]], picture[1])
        except ValueError as error:
            self.broken.append(str(error))
            return None

    def _encoded(self, pictures: Sequence[tuple[Picture, Pixels]]) -> Iterator[tuple[Picture, Latents]]:
        """The latents of pictures of one size, float32 on the CPU, and their masks at the latents' size."""
        if not pictures:
            return
        latents = self.encode(torch.stack([pixels.pixels for _, pixels in pictures])).detach().to("cpu", torch.float32, copy=True)
        bad = [str(self.data.images[picture[0]].path) for (picture, _), row in zip(pictures, latents, strict=True) if not is_finite(row)]
        if bad:
            raise ValueError(f"the VAE gives latents that are not finite for {listing(bad)}; use --no_half_vae, or another --vae")
        for (picture, pixels), row in zip(pictures, latents, strict=True):
            yield picture, _at_one_size(row.clone(), pixels.mask)

    def _agreeing(self, places: dict[Picture, NpzNames], npz: NpzLatents) -> dict[Picture, NpzNames]:
        """The places, where one picture encoded anew comes out as its file has it; else none of them."""
        if not places:
            return places
        (index, flipped), names = next(iter(places.items()))
        image = self.data.images[index]
        theirs, _ = read_latents(image, names, npz, flipped)
        pixels = self._load((index, flipped))
        ours = [latents.latents for _, latents in self._encoded([((index, flipped), pixels)] if pixels else [])]
        difference = relative_difference(theirs, ours[0]) if ours else 0.0
        if difference <= MOST_DIFFERENCE:
            return places
        logger.warning(
            "%s: %d files of sd-scripts are not used: the latents in %s differ by %.0f %% from what this VAE makes of the image",
            self.what, len({it for it, _ in places}), latents_file(image, npz), 100 * difference,
        )  # fmt: skip
        return {}


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """The norm of the difference of two tensors over that of the second."""
    return float((theirs.float() - ours.float()).norm() / ours.float().norm().clamp(min=1e-12))


# Pictures and their entries


def _pixels(image: ImageEntry, flipped: bool) -> Pixels:
    """What the cache shows of an image: its centre."""
    return load_picture(
        image.path,
        centre_crop(image.placement, flipped),
        interpolation=image.options.resize_interpolation,
        alpha=image.options.alpha_mask,
        mask=image.mask,
    )


def _at_one_size(latents: Tensor, mask: Tensor | None) -> Latents:
    return Latents(latents, None if mask is None else pooled_mask(mask, *latents.shape[1:]))


def _of_one_size(images: Sequence[ImageEntry], pictures: Iterable[Picture], most: int) -> Iterator[list[Picture]]:
    """The pictures in groups of at most `most` that share a bucket."""
    buckets: dict[Size, list[Picture]] = {}
    for picture in pictures:
        buckets.setdefault(images[picture[0]].placement.bucket, []).append(picture)
    for group in buckets.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))


def _write(store: CachedLatents, picture: Picture, latents: Latents) -> None:
    tensors = {"latents": latents.latents} if latents.mask is None else latents._asdict()
    write_entry(store.path(picture), tensors, {"image": store.images[picture[0]].name})


def _keys(images: Sequence[ImageEntry], identity: str) -> dict[bool, bytes]:
    hashes = _content_hashes({str(path) for image in images for path in (image.path, image.mask) if path is not None})
    flips = any(image.options.flip_aug for image in images)
    return {
        flipped: b"".join(_key(image, flipped, hashes, identity) for image in images) for flipped in ((False, True) if flips else (False,))
    }


def _key(image: ImageEntry, flipped: bool, hashes: Mapping[str, str], identity: str) -> bytes:
    crop = centre_crop(image.placement, flipped)
    return key_of(
        image=hashes[str(image.path)],
        mask=None if image.mask is None else hashes[str(image.mask)],
        alpha=image.options.alpha_mask,
        crop=[crop.resized, crop.corner, crop.size, crop.flipped],
        interpolation=image.options.resize_interpolation,
        preprocessing=PREPROCESSING,
        model=identity,
    )


def _content_hashes(files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files by path, those that an index knows from there."""
    paths = [Path(file) for file in files]  # their own: a path that was once a key keeps its hash, at the price of a third of an entry
    indexes = {folder: FileIndex(folder) for folder in {path.parent for path in paths}}
    hashes = each(lambda path: _content_hash(indexes[path.parent], path), paths)
    for index in indexes.values():
        index.save()
    return {str(path): found for path, found in zip(paths, hashes, strict=True)}


def _content_hash(index: FileIndex, path: Path) -> str:
    try:
        return index.content_hash(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
