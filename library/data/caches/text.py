"""The cache of text states: every caption that the model may read, encoded once."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from library.core.log import get_logger
from library.core.options import OptionError
from library.data.batch import TextStates
from library.data.cacheable import text_problems
from library.data.caches.entries import clean, entry_path, is_wanted, key_of, read_entry, states, write_entry
from library.data.caches.latents import relative_difference
from library.data.caches.npz import NpzText, find_text, read_text
from library.data.caches.rounds import Shard, in_turn, kept_behind, told
from library.data.dataset import TrainingData
from library.data.entries import ImageEntry

logger = get_logger(__name__)
KIND = "text"
ROWS = "rows"
MOST_DIFFERENCE = 0.1  # of sd-scripts' states from ours, by their norm: half precision stays within, other text encoders do not
EncodeText = Callable[[list[str]], TextStates]


@dataclass(frozen=True)
class Trimmed:
    """Tensors without the rows of zeros at their ends, and how many rows each had."""

    tensors: dict[str, Tensor]
    rows: dict[str, int]

    def whole(self) -> TextStates:
        """The tensors as they were."""
        return {name: _padded(tensor, self.rows[name]) for name, tensor in self.tensors.items()}


def trimmed(tensors: Mapping[str, Tensor]) -> Trimmed:
    """Leave out the rows (along dimension 0) at the end of each tensor whose bytes are all zero: padding, mostly."""
    kept = {name: tensor[: _rows_with_bytes(tensor)].clone() for name, tensor in tensors.items()}
    return Trimmed(kept, {name: len(tensor) for name, tensor in tensors.items()})


@dataclass
class CachedText:
    """Text states by caption: in memory, in files of ours, or in files of sd-scripts.

    Captions on disk are known by the key of their entry: to keep the captions themselves would cost more than all else here.
    """

    identity: str = ""
    kept: dict[str, Trimmed] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    keys: dict[bytes, int] = field(default_factory=dict)  # of each entry -> the index of its folder
    npz: NpzText | None = None
    places: dict[bytes, str] = field(default_factory=dict)  # of each entry that sd-scripts' file stands for -> that file

    def states(self, caption: str) -> TextStates:
        """The states of one caption, without the batch dimension. Raises `ValueError` for an entry that is damaged."""
        if caption in self.kept:
            return self.kept[caption].whole()
        key = self.key(caption)
        if key in self.places:
            assert self.npz is not None
            return read_text(Path(self.places[key]), self.npz)
        entry = read_entry(self.path(caption))
        return Trimmed(entry.tensors, json.loads(entry.facts[ROWS])).whole()

    def add(self, captions: Mapping[str, ImageEntry]) -> dict[str, Path]:
        """Know captions, each with the image beside which its entry stands; the entries' files."""
        folders = {folder: number for number, folder in enumerate(dict.fromkeys(image.folder for image in captions.values()))}
        self.folders = list(folders)
        paths = {}
        for caption, image in captions.items():
            key = self.key(caption)
            self.keys[key] = folders[image.folder]
            paths[caption] = entry_path(image.folder, KIND, key)
        return paths

    def key(self, caption: str) -> bytes:
        """The key of a caption's entry."""
        return key_of(caption=caption, model=self.identity)

    def path(self, caption: str) -> Path:
        """The file of a caption's own entry."""
        key = self.key(caption)
        return entry_path(self.folders[self.keys[key]], KIND, key)


def fill_text(
    data: TrainingData,
    encode: EncodeText,
    *,
    identity: str,
    to_disk: bool,
    batch_size: int,
    shard: Shard = (0, 1),
    npz: NpzText | None = None,
) -> None:
    """Encode every caption that the model may read (the empty one where captions are dropped) and let `data` give its states.

    `encode` maps captions to tensors with the batch in dimension 0; `identity` changes whenever its results would. On disk the
    processes of `shard` share the work, and what `npz` finds of sd-scripts' beside the images is used in place.
    Raises `ValueError` for options that make more captions than can be cached, and for a folder that cannot be written to.
    """
    if problems := text_problems(data.datasets, data.options.text_cache_variants):
        raise OptionError(problems)
    for part, what in ((data, KIND), (data.validation, f"validation {KIND}")):
        if part is not None:
            filling = _Filling(part, encode, batch_size, shard if to_disk else (0, 1), what)
            part.text = filling.on_disk(identity, npz) if to_disk else filling.in_memory()


@dataclass
class _Filling:
    """One filling of the cache of some captions."""

    data: TrainingData
    encode: EncodeText
    batch_size: int
    shard: Shard
    what: str

    def in_memory(self) -> CachedText:
        store = CachedText()
        self._encode(list(self.data.captions_to_cache()), store.kept.__setitem__, lambda caption: caption not in store.kept)
        return store

    def on_disk(self, identity: str, npz: NpzText | None) -> CachedText:
        captions = self.data.captions_to_cache()
        store = CachedText(identity, npz=npz)
        paths = store.add(captions)
        clean(store.folders)
        found = dict(zip(paths, states(paths.values(), check=not self.data.options.skip_cache_check), strict=True))
        missing = [caption for caption, state in found.items() if state == "missing"]
        if npz is not None and missing:
            found_there = self._agreeing(find_text({caption: captions[caption] for caption in missing}, npz), npz)
            store.places = {store.key(caption): str(path) for caption, path in found_there.items()}
        broken = {caption for caption, state in found.items() if state == "broken"}
        to_encode = [caption for caption in missing if store.key(caption) not in store.places] + sorted(broken)
        logger.info(
            "%s: %d in the cache%s, %d to encode%s",
            self.what,
            len(captions) - len(missing) - len(broken),
            f", {len(store.places)} in files of sd-scripts" if store.places else "",
            len(to_encode),
            f", of which {len(broken)} replace a broken entry" if broken else "",
        )
        self._encode(
            to_encode,
            lambda caption, encoded: _write(paths[caption], caption, encoded),
            lambda caption: is_wanted(paths[caption], check=caption in broken),
        )
        return store

    def _encode(self, captions: Sequence[str], keep: Callable[[str, Trimmed], None], wanted: Callable[[str], bool]) -> None:
        """Encode captions and keep their states; those not `wanted` any more when their turn comes were encoded by another process."""
        size = self.batch_size
        chunks = in_turn([captions[start : start + size] for start in range(0, len(captions), size)], self.shard)
        with kept_behind(keep) as keep_later, told(self.what, len(captions), self.shard[0] == 0) as done:
            for chunk in chunks:
                own = [caption for caption in chunk if wanted(caption)]
                for caption, encoded in self._encoded(own):
                    keep_later(caption, encoded)
                done(len(chunk), len(own))

    def _encoded(self, captions: list[str]) -> list[tuple[str, Trimmed]]:
        if not captions:
            return []
        batch = {name: tensor.detach().cpu() for name, tensor in self.encode(captions).items()}
        return [(caption, trimmed({name: tensor[row] for name, tensor in batch.items()})) for row, caption in enumerate(captions)]

    def _agreeing(self, places: dict[str, Path], npz: NpzText) -> dict[str, Path]:
        """The places, where one caption encoded anew comes out as its file has it; else none of them."""
        if not places:
            return places
        caption, place = next(iter(places.items()))
        theirs = read_text(place, npz)
        [(_, ours)] = self._encoded([caption])
        difference = _difference(theirs, ours.whole())
        if difference <= MOST_DIFFERENCE:
            return places
        logger.warning(
            "%s: %d files of sd-scripts are not used: the states in %s differ by %.0f %% from what these text encoders make of the caption",
            self.what, len(places), place, 100 * difference,
        )  # fmt: skip
        return {}


# Entries


def _write(path: Path, caption: str, encoded: Trimmed) -> None:
    write_entry(path, encoded.tensors, {"caption": caption, ROWS: json.dumps(encoded.rows)})


# Rows of zeros


def _rows_with_bytes(tensor: Tensor) -> int:
    """How many rows there are up to the last with a byte that is not zero: minus zero is one of these, and comes back as such."""
    if not tensor.numel():
        return 0
    rows = tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(len(tensor), -1).any(dim=1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - len(tensor)))


def _difference(theirs: TextStates, ours: TextStates) -> float:
    """The largest relative difference of any of the tensors; whole where names or shapes differ."""
    if {name: tensor.shape for name, tensor in theirs.items()} != {name: tensor.shape for name, tensor in ours.items()}:
        return 1.0
    return max(relative_difference(theirs[name], tensor) for name, tensor in ours.items())
