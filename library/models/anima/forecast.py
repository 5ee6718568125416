"""What can be said of Anima before it is loaded."""

from pathlib import Path
from typing import Any, cast

import torch

from library.models.anima.options import ModelOptions
from library.models.anima.tokenizers import find_tokenizers
from library.models.architecture import Tokens
from library.models.forecast import Forecast

FLOAT, LONG = 4, 8  # bytes
HIDDEN = 1024  # width of Qwen3's states


def forecast(options: Any) -> Forecast:
    """Rows of padding are not cached: what counts are the words, with their mask, and T5's ids with theirs."""
    files = cast(ModelOptions, options)
    return Forecast(
        caption_limit=min(files.qwen3_max_token_length, files.t5_max_token_length),
        text_bytes=lambda tokens: (
            min(tokens, files.qwen3_max_token_length) * (HIDDEN * FLOAT + LONG) + min(tokens + 1, files.t5_max_token_length) * 2 * LONG
        ),
        tokens=lambda batch: _tokens(files, batch),
        tokenizers=lambda: _tokenizers(files),
    )


def _tokens(files: ModelOptions, batch: int) -> Tokens:
    lengths = {"qwen": files.qwen3_max_token_length, "t5": files.t5_max_token_length}
    return {f"{name}_{what}": torch.ones(batch, length, dtype=torch.int64) for name, length in lengths.items() for what in ("ids", "mask")}


def _tokenizers(files: ModelOptions) -> list[Any]:
    t5, qwen, cache = (
        None if given is None else Path(given) for given in (files.t5_tokenizer_path, files.qwen3_tokenizer_path, files.tokenizer_cache_dir)
    )
    return find_tokenizers(files.text_encoder, t5, files.dit, qwen_tokenizer=qwen, cache=cache)
