"""SDXL's text: captions to token ids in chunks, token ids to hidden states and the pooled vector."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.core.log import get_logger, warn_once
from library.data.batch import TextStates
from library.models.architecture import Tokens
from library.models.sdxl.vocabulary import SPECIAL, Vocabulary

logger = get_logger(__name__)

CHUNK = 75  # words of a chunk at CLIP's 77 positions
IDS = ("ids_1", "ids_2")


def build_tokenizers(vocabularies: Sequence[Vocabulary], text_encoders: Sequence[nn.Module]) -> list[Any]:
    """A `CLIPTokenizer` for each encoder, as long as its positions. Raises `ValueError` where vocabulary and embedding differ in size."""
    from transformers import CLIPTokenizer

    tokenizers = []
    for n, (vocabulary, encoder) in enumerate(zip(vocabularies, text_encoders, strict=True), start=1):
        config: Any = encoder.config
        if len(vocabulary.ids) != config.vocab_size:
            raise ValueError(
                f"the tokenizer in {vocabulary.where} has {len(vocabulary.ids)} tokens, text encoder {n} embeds {config.vocab_size}; "
                "give the tokenizer of this checkpoint with --tokenizer"
            )
        merges: Any = vocabulary.merges
        tokenizers.append(CLIPTokenizer(vocab=vocabulary.ids, merges=merges, model_max_length=config.max_position_embeddings))
    logger.info("tokenizer: %s", vocabularies[0].where)
    tokenizers[1].pad_token_id = 0  # set now: a pad token given to the constructor would become special in captions too
    return tokenizers


def clean(caption: str) -> str:
    """The caption as CLIP's own tokenizer prepares it: mended Unicode, entities resolved twice, single spaces, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str], max_token_length: int) -> Tokens:
    """`ids_1` and `ids_2`, each (batch, chunks, positions) int64: every chunk is begin, up to 75 words, end, padding.

    Captions beyond `max_token_length` (75 words a chunk) are cut, with one warning.
    """
    cleaned = [clean(caption) for caption in captions]
    chunks = max_token_length // CHUNK
    return {key: _chunked(tokenizer, cleaned, chunks) for key, tokenizer in zip(IDS, tokenizers, strict=True)}


def overlong(tokenizers: Sequence[Any], captions: Sequence[str], max_token_length: int) -> list[int]:
    """How many tokens of each caption are beyond `max_token_length`; 0 for one that fits. Both encoders share one vocabulary."""
    words = tokenizers[0]([clean(caption) for caption in captions], add_special_tokens=False, verbose=False).input_ids
    return [max(0, len(ids) - max_token_length) for ids in words]


def encode_text(text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
    """`hidden_states` (batch, 75 * chunks + 2, width 1 + width 2) of both encoders, `pooled` (batch, projection) of the second.

    `hidden_states[-2]` of transformers is the output of the last layer but one, without the final norm, as SDXL was trained.
    The pooled vector is that of the first chunk.
    """
    outputs = [_encoded(encoder, tokens[key].flatten(0, 1)) for key, encoder in zip(IDS, text_encoders, strict=True)]
    states = [_rejoined(output.hidden_states[-2], tokens[key]) for key, output in zip(IDS, outputs, strict=True)]
    chunks = tokens[IDS[1]].shape[1]
    return {"hidden_states": torch.cat(states, dim=-1), "pooled": outputs[1].text_embeds[::chunks]}


def _chunked(tokenizer: Any, captions: Sequence[str], chunks: int) -> Tensor:
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL)
    room = tokenizer.model_max_length - 2
    rows = []
    for words in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
        if len(words) > chunks * room:
            warn_once(
                logger, f"captions of more than {chunks * room} tokens are cut there; a larger --max_token_length (75, 150, 225) keeps more"
            )
        pieces = [words[n * room : (n + 1) * room] for n in range(chunks)]
        rows.append([[begin, *piece, end, *[tokenizer.pad_token_id] * (room - len(piece))] for piece in pieces])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), chunks, room + 2)


def _encoded(encoder: nn.Module, ids: Tensor) -> Any:
    return encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)


def _rejoined(states: Tensor, ids: Tensor) -> Tensor:
    """(batch * chunks, positions, width) to (batch, 75 * chunks + 2, width): the first begin, all words and padding, the last end."""
    batch, chunks, positions = ids.shape
    states = states.reshape(batch, chunks, positions, -1)
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
