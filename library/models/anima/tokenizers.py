"""Anima's two tokenizers: Qwen3's byte-level BPE for the text encoder, T5's unigram pieces for the ids that the denoiser embeds.

Both run on the `tokenizers` library and are read from files without the network where any copy is at hand.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.models.anima.tokenizer_files import read_qwen, read_t5
from library.models.vocabulary_files import cache_folders, hub_folder


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the two tokenizers: its files, where it is looked for and how its sequences end and are filled up."""

    title: str
    hub_name: str
    hub_files: tuple[str, ...]
    needs: str  # the files that make a folder one of this kind
    option: str  # that names another place
    suffix: str  # of the folder beside a model file: anima.t5_tokenizer for anima.safetensors
    folder: str  # component of a diffusers folder
    pad: str
    end: tuple[str, ...]  # what every sequence ends with
    read: Callable[[Path], Any | None]  # the tokenizer of a folder or file


QWEN = Kind(
    title="Qwen3",
    hub_name="Qwen/Qwen3-0.6B",
    hub_files=("vocab.json", "merges.txt", "tokenizer_config.json"),
    needs="vocab.json, merges.txt and tokenizer_config.json, or tokenizer.json (a BPE model)",
    option="--qwen3_tokenizer_path",
    suffix=".tokenizer",
    folder="tokenizer",
    pad="<|endoftext|>",
    end=(),
    read=read_qwen,
)
T5 = Kind(
    title="T5",
    hub_name="google-t5/t5-base",  # all sizes of T5 and T5 v1.1 have the same
    hub_files=("tokenizer.json",),
    needs="tokenizer.json (a Unigram model) or spiece.model",
    option="--t5_tokenizer_path",
    suffix=".t5_tokenizer",
    folder="t5_tokenizer",
    pad="<pad>",
    end=("</s>",),
    read=read_t5,
)


@dataclass(frozen=True)
class Tokenizer:
    """Captions to ids: the words' ids, the ids that end every sequence, and the one that fills it up."""

    backend: Any  # tokenizers.Tokenizer
    pad: int
    end: tuple[int, ...]
    where: str

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(self, caption: str) -> list[int]:
        """The ids of a caption of any length, its end included."""
        return [*self.backend.encode(caption, add_special_tokens=False).ids, *self.end]


def find_tokenizers(
    qwen3: Path, t5: Path | None, dit: Path, *, qwen_tokenizer: Path | None = None, cache: Path | None = None
) -> list[Tokenizer]:
    """The tokenizers of Qwen3 and of T5, each from the first place that has one.

    Qwen3's: `qwen_tokenizer` where given, beside the text encoder, in the diffusers folder `dit`, the hub's cache or the hub. T5's: `t5`
    where given, beside the denoiser, beside the text encoder, the hub's cache or the hub. `cache` is a hub cache besides the usual one.
    Raises `ValueError` that says what a given place lacks, or which files to put where.
    """
    return [_find(QWEN, qwen_tokenizer, (qwen3, dit), cache), _find(T5, t5, (dit, qwen3), cache)]


def check_sizes(tokenizers: Sequence[Tokenizer], qwen_embeddings: int, t5_embeddings: int) -> None:
    """Raise `ValueError` for a tokenizer with ids beyond the rows that its model embeds, or with less than half as many."""
    for kind, tokenizer, rows in zip((QWEN, T5), tokenizers, (qwen_embeddings, t5_embeddings), strict=True):
        if not rows < 2 * tokenizer.size <= 2 * rows:
            raise ValueError(
                f"the {kind.title} tokenizer in {tokenizer.where} has {tokenizer.size} tokens, the model embeds {rows}: it is another "
                f"model's; give this model's with {kind.option}"
            )


# Places


def _find(kind: Kind, given: Path | None, models: Iterable[Path], cache: Path | None) -> Tokenizer:
    if given is not None:
        found = _read(kind, given)
        if found is None:
            raise ValueError(f"{kind.option} {given}: no {kind.title} tokenizer there; needs {kind.needs} with the token {kind.pad}")
        return found
    places = [place for model in models for place in _beside(kind, model)]
    cached = [] if cache is None else [cache / kind.folder, *cache_folders(cache, kind.hub_name)]
    found = next((found for place in (*places, *cached) if (found := _read(kind, place)) is not None), None)
    if found is None:
        folder = hub_folder(kind.hub_name, kind.hub_files, cache)
        found = None if folder is None else _read(kind, folder)
    if found is None:
        raise ValueError(
            f"no {kind.title} tokenizer found: put {kind.needs}, as in {kind.hub_name} on the hub, into the folder {places[0]}, "
            f"or give their folder with {kind.option}"
        )
    return found


def _beside(kind: Kind, model: Path) -> list[Path]:
    """Folders by a model file or folder that may hold its tokenizer, the one to name in an error first."""
    around = [model.parent / kind.folder, model.parent]
    if model.is_dir():
        return [model / kind.folder, model, *around]
    return [model.with_name(model.stem + kind.suffix), *around]


def _read(kind: Kind, place: Path) -> Tokenizer | None:
    """The tokenizer of a folder or file, None where it holds none of this kind, or one without the tokens that this kind ends with."""
    backend = kind.read(place)
    if backend is None:
        return None
    special = [backend.token_to_id(token) for token in (kind.pad, *kind.end)]
    if None in special:
        return None
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, special[0], tuple(special[1:]), str(place))
