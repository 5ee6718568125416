"""What can be said of SDXL before it is loaded."""

from typing import Any, cast

import torch

from library.models.architecture import Tokens
from library.models.forecast import Forecast
from library.models.sdxl.options import ModelOptions
from library.models.sdxl.text import CHUNK, IDS, WEIGHTS
from library.models.sdxl.vocabulary import find_vocabularies

FLOAT = 4  # bytes
POSITIONS = 77  # of CLIP: 75 words between begin and end
HIDDEN, POOLED = 768 + 1280, 1280  # width of both encoders' states, and of the pooled vector


def forecast(options: Any) -> Forecast:
    """The caption's whole length is cached, whatever its words: chunks are padded."""
    files = cast(ModelOptions, options)
    return Forecast(
        caption_limit=files.tokens,
        text_bytes=lambda tokens: ((files.tokens + 2) * HIDDEN + POOLED) * FLOAT,
        tokens=lambda batch: _tokens(files, batch),
        tokenizers=lambda: _tokenizers(files),
    )


def _tokens(files: ModelOptions, batch: int) -> Tokens:
    shape = batch, files.tokens // CHUNK, POSITIONS
    tokens: Tokens = {key: torch.zeros(shape, dtype=torch.int64) for key in IDS}
    return tokens | ({key: torch.ones(shape) for key in WEIGHTS} if files.weighted_captions else {})


def _tokenizers(files: ModelOptions) -> list[Any]:
    from transformers import CLIPTokenizer

    found = find_vocabularies(files.checkpoint, files.tokenizer, files.tokenizer_cache_dir)
    merges: list[Any] = [vocabulary.merges for vocabulary in found]
    return [CLIPTokenizer(vocab=one.ids, merges=pairs, model_max_length=POSITIONS) for one, pairs in zip(found, merges, strict=True)]
