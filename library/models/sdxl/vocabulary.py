"""CLIP's vocabulary: where it is found, read from files without the network where any copy is at hand.

Both tokenizers of SDXL share one vocabulary; a folder with `tokenizer/` and `tokenizer_2/` may hold two.
"""

import gzip
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from library.models.vocabulary_files import cache_folders, hub_folder, merge_pair, read_merges, read_table

HUB_NAME = "openai/clip-vit-large-patch14"
FILES = ("vocab.json", "merges.txt")
PACKAGE, PACKAGE_FILE = "open_clip", "bpe_simple_vocab_16e6.txt.gz"
BYTES = 256
MERGES = 48894  # CLIP uses these of the merges that the file of the package lists
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """A byte-pair vocabulary: ids by token, merges in order, and where it was found."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    where: str


Pair = tuple[Vocabulary, Vocabulary]


def find_vocabularies(checkpoint: Path, folder: str | None = None, cache: str | None = None) -> Pair:
    """The vocabularies of both tokenizers, from the first place that has one.

    The places: `folder` (`--tokenizer`; nothing else is tried then), beside the checkpoint, `cache` (`--tokenizer_cache_dir`), an installed
    open_clip_torch, the hub. Raises `ValueError` that says what a given folder lacks, or which files to put where when none is found.
    """
    if folder is not None:
        pair = _in_folder(Path(folder))
        if pair is None:
            raise ValueError(f"--tokenizer {folder}: needs {' and '.join(FILES)} in it, or in its subfolders tokenizer and tokenizer_2")
        return pair
    sources: tuple[Callable[[], Pair | None], ...] = (
        lambda: _first(_beside(checkpoint)),
        lambda: _first(cache_folders(Path(cache), HUB_NAME)) if cache else None,
        _in_package,
        lambda: _from_hub(cache),
    )
    for source in sources:
        pair = source()
        if pair is not None:
            return pair
    raise ValueError(
        f"no CLIP tokenizer found for {checkpoint}: put {' and '.join(FILES)} of {HUB_NAME} into the folder {_beside(checkpoint)[0]}, "
        "or give their folder with --tokenizer, or install open_clip_torch"
    )


def byte_tokens() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies, printable bytes first, as GPT-2 and CLIP order them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(BYTES + n) for n in range(BYTES - len(printable))]


def from_merges(merges: list[tuple[str, str]], where: str) -> Vocabulary:
    """CLIP's vocabulary over these merges: bytes, bytes that end a word, merged pairs, the two special tokens."""
    characters = byte_tokens()
    tokens = [*characters, *(character + "</w>" for character in characters), *("".join(pair) for pair in merges), *SPECIAL]
    return Vocabulary({token: number for number, token in enumerate(tokens)}, merges, where)


# Places


def _beside(checkpoint: Path) -> list[Path]:
    if checkpoint.is_dir():
        return [checkpoint]
    return [checkpoint.with_name(checkpoint.stem + ".tokenizer"), checkpoint.parent]


def _first(folders: Iterable[Path]) -> Pair | None:
    return next((pair for folder in folders if (pair := _in_folder(folder)) is not None), None)


def _in_folder(folder: Path) -> Pair | None:
    """The vocabularies in this folder, or in its subfolders `tokenizer` and `tokenizer_2` (the first alone serves both)."""
    first = _read_folder(folder) or _read_folder(folder / "tokenizer")
    return (first, _read_folder(folder / "tokenizer_2") or first) if first else None


def _in_package() -> Pair | None:
    """The vocabulary file of open_clip_torch, read as data: importing the package would drag timm and torchvision along."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in spec.submodule_search_locations or () if spec else ():
        path = Path(place) / PACKAGE_FILE
        if path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
            vocabulary = from_merges([merge_pair(line) for line in lines[1 : 1 + MERGES]], str(path))
            return vocabulary, vocabulary
    return None


def _from_hub(cache: str | None) -> Pair | None:
    folder = hub_folder(HUB_NAME, FILES, Path(cache) if cache else None)
    return None if folder is None else _in_folder(folder)


# Files


def _read_folder(folder: Path) -> Vocabulary | None:
    vocab, merges, single = folder / FILES[0], folder / FILES[1], folder / "tokenizer.json"
    if vocab.is_file() and merges.is_file():
        return _checked(Vocabulary(read_table(vocab), read_merges(merges), str(folder)))
    if single.is_file():
        model = read_table(single).get("model", {})
        pairs = [merge_pair(entry) if isinstance(entry, str) else tuple(entry) for entry in model.get("merges", [])]
        return _checked(Vocabulary(model.get("vocab", {}), pairs, str(folder)))
    return None


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    missing = [token for token in SPECIAL if token not in vocabulary.ids]
    if missing:
        raise ValueError(f"{vocabulary.where}: not a CLIP tokenizer: its vocabulary lacks {' and '.join(missing)}")
    return vocabulary
