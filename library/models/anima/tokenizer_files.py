"""The files of Anima's tokenizers: each reader gives a `tokenizers.Tokenizer`, or None where a place holds none of its kind."""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from library.models.anima.sentencepiece_file import read_sentencepiece
from library.models.vocabulary_files import read_merges, read_table

WORDS = (  # what Qwen2 and its successors cut text into before the merges: contractions, words, single digits, marks, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # after the vocabulary where no tokenizer_config.json lists more


def read_qwen(place: Path) -> Any | None:
    """Qwen's byte-level BPE from `vocab.json` and `merges.txt` (added tokens from `tokenizer_config.json`), or from `tokenizer.json`."""
    vocab, merges = place / "vocab.json", place / "merges.txt"
    if vocab.is_file() and merges.is_file() and not _is_clip(read_table(vocab)):
        return _from_merges(vocab, merges, place / "tokenizer_config.json")
    return _from_json(place, "BPE")


def read_t5(place: Path) -> Any | None:
    """T5's unigram pieces from `tokenizer.json`, or from `spiece.model`. Raises `ValueError` for one that knows no words."""
    path = place / "spiece.model" if place.is_dir() else place
    found = _from_json(place, "Unigram")
    if found is None and path.is_file() and path.suffix == ".model":
        found = read_sentencepiece(path)
    if found is not None and found.token_to_id("<unk>") in found.encode("a", add_special_tokens=False).ids:
        raise ValueError(f"{place}: a broken T5 tokenizer: it reads the word 'a' as <unk>")
    return found


def _from_json(place: Path, model: str) -> Any | None:
    """The tokenizer of a `tokenizer.json` or its folder, None where there is none or its model is another one."""
    from tokenizers import Tokenizer

    path = place / "tokenizer.json" if place.is_dir() else place
    found = read_table(path).get("model") if path.is_file() and path.suffix == ".json" else None
    if not isinstance(found, dict) or _kind(found) != model or _is_clip(found.get("vocab", ())):
        return None
    return _built(path, lambda: Tokenizer.from_file(str(path)))


def _from_merges(vocab: Path, merges: Path, config: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = _built(merges, lambda: Tokenizer(BPE(vocab=read_table(vocab), merges=read_merges(merges))))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, config)
    return tokenizer


def _add_tokens(tokenizer: Any, config: Path) -> None:
    """Whole tokens besides the vocabulary, in the order of their ids."""
    from tokenizers import AddedToken

    listed = read_table(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    if not listed:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    for number, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(entry["content"], **flags)])
        if tokenizer.token_to_id(entry["content"]) != int(number):
            got = tokenizer.token_to_id(entry["content"])
            raise ValueError(f"{config}: says that {entry['content']} is token {number}; after the vocabulary beside it, it is {got}")


def _kind(model: dict[str, Any]) -> str:
    """The type of a model; older files leave it to be told by what they hold."""
    return model.get("type") or ("Unigram" if isinstance(model.get("vocab"), list) else "BPE" if "merges" in model else "")


def _built(path: Path, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _is_clip(vocabulary: Container[str]) -> bool:
    """CLIP's vocabulary looks like Qwen's, but marks the ends of words."""
    return "a</w>" in vocabulary
