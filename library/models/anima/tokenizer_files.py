"""The files of Anima's tokenizers: each reader gives a `tokenizers.Tokenizer`, or None where a place holds none of its kind."""

import json
from pathlib import Path
from typing import Any

WORDS = (  # what Qwen2 and its successors cut text into before the merges: contractions, words, single digits, marks, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # after the vocabulary where no tokenizer_config.json lists more


def read_qwen(place: Path) -> Any | None:
    """Qwen's byte-level BPE from `vocab.json` and `merges.txt` (added tokens from `tokenizer_config.json`), or from `tokenizer.json`."""
    vocab, merges = place / "vocab.json", place / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return _from_merges(vocab, merges, place / "tokenizer_config.json")
    return _from_json(place, "BPE")


def read_t5(place: Path) -> Any | None:
    """T5's unigram pieces from `tokenizer.json`."""
    return _from_json(place, "Unigram")


def _from_json(place: Path, model: str) -> Any | None:
    """The tokenizer of a `tokenizer.json` or its folder, None where there is none or its model is another one."""
    from tokenizers import Tokenizer

    path = place / "tokenizer.json" if place.is_dir() else place
    if not path.is_file() or path.suffix != ".json" or _table(path).get("model", {}).get("type") != model:
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _from_merges(vocab: Path, merges: Path, config: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]
    tokenizer = Tokenizer(BPE(vocab=_table(vocab), merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, config)
    return tokenizer


def _add_tokens(tokenizer: Any, config: Path) -> None:
    """Whole tokens besides the vocabulary, in the order of their ids."""
    from tokenizers import AddedToken

    listed = _table(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    if not listed:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(entry["content"], **flags)])
        if tokenizer.token_to_id(entry["content"]) != int(number):
            got = tokenizer.token_to_id(entry["content"])
            raise ValueError(f"{config}: says that {entry['content']} is token {number}; after the vocabulary beside it, it is {got}")


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: not a table")
    return table


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.strip("\r").partition(" ")
    return left, right
