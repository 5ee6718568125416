"""Anima's text: captions to the ids of both tokenizers, ids to the hidden states of Qwen3.

T5 has ids only: the denoiser's text conditioner embeds them and reads Qwen3's states through them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.core.log import get_logger, warn_once
from library.data.batch import TextStates
from library.models.anima.tokenizers import Tokenizer
from library.models.architecture import Tokens
from library.models.outlines import is_outline

logger = get_logger(__name__)

LENGTH = 512  # tokens of a caption, for both tokenizers, unless an option says otherwise
OPTIONS = ("--qwen3_max_token_length", "--t5_max_token_length")


def tokenize(tokenizers: Sequence[Tokenizer], captions: Sequence[str], qwen_length: int = LENGTH, t5_length: int = LENGTH) -> Tokens:
    """`qwen_ids` and `qwen_mask` (batch, qwen_length), `t5_ids` and `t5_mask` (batch, t5_length): int64, padded on the right.

    Longer captions are cut, with one warning for each tokenizer; T5's end token is kept. An empty caption has no token of Qwen's, and
    the end token alone of T5's.
    """
    tokens: Tokens = {}
    for name, tokenizer, length, option in zip(("qwen", "t5"), tokenizers, (qwen_length, t5_length), OPTIONS, strict=True):
        tokens[f"{name}_ids"], tokens[f"{name}_mask"] = _padded(tokenizer, captions, length, option)
    return tokens


def overlong(tokenizers: Sequence[Tokenizer], captions: Sequence[str], qwen_length: int = LENGTH, t5_length: int = LENGTH) -> list[int]:
    """How many tokens of each caption `tokenize` would cut, by the tokenizer that cuts more; 0 for a caption that fits."""
    limits = list(zip(tokenizers, (qwen_length, t5_length), strict=True))
    return [max(0, *(len(tokenizer(caption)) - length for tokenizer, length in limits)) for caption in captions]


def encode_text(encoder: nn.Module, tokens: Tokens) -> TextStates:
    """`hidden_states` (batch, length, width) after Qwen3's final norm, zero outside `mask`; `mask`, `t5_ids` and `t5_mask` as given.

    Attention is causal and padding is on the right, so no word sees padding: the encoder runs without a mask, on the longest caption of
    the batch only. Differentiable in the encoder's parameters.
    """
    weight = next(encoder.parameters())
    ids, mask = tokens["qwen_ids"], tokens["qwen_mask"]
    longest = mask.shape[1] if is_outline(mask) else max(1, int(mask.sum(dim=1).max()))
    output: Any = encoder(input_ids=ids[:, :longest].to(weight.device), use_cache=False)
    padding = (mask[:, :longest] == 0).unsqueeze(-1).to(weight.device)
    states = output.last_hidden_state.masked_fill(padding, 0)
    return {
        "hidden_states": functional.pad(states, (0, 0, 0, ids.shape[1] - longest)),
        "mask": mask.to(weight.device),
        "t5_ids": tokens["t5_ids"].to(weight.device),
        "t5_mask": tokens["t5_mask"].to(weight.device),
    }


def _padded(tokenizer: Tokenizer, captions: Sequence[str], length: int, option: str) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(captions), length), tokenizer.pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        found = tokenizer(caption)
        if len(found) > length:
            warn_once(logger, f"captions of more than {length} tokens are cut there; a larger {option} keeps more")
            found = [*found[: length - len(tokenizer.end)], *tokenizer.end]
        ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
        mask[row, : len(found)] = 1
    return ids, mask
