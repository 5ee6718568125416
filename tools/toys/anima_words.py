"""The toy Anima's tokenizers, in the files of the real ones: Qwen's byte-level pairs, T5's unigram pieces.

Each word of the captions is one token of both; every other word is spelled, in bytes or in letters.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tools.toys.sdxl import byte_characters, caption_words, merge_words

QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_SPACE = "\u0120"  # stands for a space before a word
T5_SPACE = "\u2581"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
LENGTH = 512
_WORD_SCORE, _SPACE_SCORE, _LETTER_SCORE, _UNKNOWN_SCORE = -5.0, -8.0, -10.0, -20.0  # a word is likelier than its letters


def save_tokenizers(folder: Path) -> None:
    """Write `qwen3.tokenizer/` and `dit.t5_tokenizer/` below the folder."""
    _save_qwen(folder / "qwen3.tokenizer")
    _save_t5(folder / "dit.t5_tokenizer")


def qwen_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The byte-level vocabulary and the merges that make each word one token, after a space or at the beginning."""
    spelled = [[*start, *word] for word in sorted(set(words)) for start in ("", QWEN_SPACE)]
    merges = merge_words(spelled)
    tokens = [*byte_characters(), *dict.fromkeys("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def t5_pieces(words: list[str]) -> list[tuple[str, float]]:
    """Pieces and their scores: each word after a space, letters and marks, the space itself."""
    pieces = [(token, 0.0) for token in T5_SPECIAL[:2]] + [(T5_SPECIAL[2], _UNKNOWN_SCORE), (T5_SPACE, _SPACE_SCORE)]
    letters = string.ascii_letters + string.digits + string.punctuation
    known = [T5_SPACE + word for word in sorted(set(words))]
    return pieces + [(word, _WORD_SCORE) for word in known] + [(letter, _LETTER_SCORE) for letter in letters]


# ---------------------------------------------------------------- files


def _save_qwen(folder: Path) -> None:
    vocabulary, merges = qwen_vocabulary(caption_words())
    added = {str(len(vocabulary) + n): {"content": token, "special": True} for n, token in enumerate(QWEN_SPECIAL)}
    end, last = QWEN_SPECIAL[0], QWEN_SPECIAL[2]
    _write(folder / "vocab.json", json.dumps(vocabulary))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": LENGTH, "bos_token": None, "eos_token": last, "pad_token": end}
    _write(folder / "tokenizer_config.json", json.dumps(config | {"unk_token": None, "added_tokens_decoder": added}, indent=2))


def _save_t5(folder: Path) -> None:
    pad, end, unknown = T5_SPECIAL
    space: dict[str, Any] = {"type": "Metaspace", "replacement": T5_SPACE, "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": n, "content": token} | flags for n, token in enumerate(T5_SPECIAL)]
    ends = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    mark = {"SpecialToken": {"id": end, "type_id": 0}}
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], mark],
            "pair": [ends[0], mark, ends[1], mark],
            "special_tokens": {end: {"id": end, "ids": [1], "tokens": [end]}},
        },
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": t5_pieces(caption_words()), "byte_fallback": False},
    }
    _write(folder / "tokenizer.json", json.dumps(table, indent=1))
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": LENGTH, "extra_ids": 0}
    _write(folder / "tokenizer_config.json", json.dumps(config | {"pad_token": pad, "eos_token": end, "unk_token": unknown}, indent=2))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
