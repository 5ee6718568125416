"""SDXL's text: captions to token ids in chunks, token ids to hidden states and the pooled vector, words weighted where asked."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from library.core.log import get_logger, warn_once
from library.data.batch import TextStates
from library.models.architecture import Tokens
from library.models.emphasis import Emphasised, emphasised
from library.models.sdxl.vocabulary import SPECIAL, Vocabulary

logger = get_logger(__name__)
Number = TypeVar("Number", int, float)

CHUNK = 75  # words of a chunk at CLIP's 77 positions
IDS = ("ids_1", "ids_2")
WEIGHTS = ("weights_1", "weights_2")


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


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str], max_token_length: int, weighted: bool = False) -> Tokens:
    """`ids_1` and `ids_2`, each (batch, chunks, positions) int64: every chunk is begin, up to 75 words, end, padding.

    With `weighted`, also `weights_1` and `weights_2` of the same shape in float32: the weights of the words that the captions give in
    brackets (see `library.models.emphasis`), 1 at all other positions. Captions beyond `max_token_length` (75 words a chunk) are cut,
    with one warning.
    """
    tokens: Tokens = {}
    for ids_key, weights_key, tokenizer in zip(IDS, WEIGHTS, tokenizers, strict=True):
        words = _words(tokenizer, captions, weighted)
        _tell_cut(words, max_token_length)
        begin, end = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL)
        ids = [[word.id for word in each] for each in words]
        tokens[ids_key] = _chunked(ids, max_token_length, begin, end, tokenizer.pad_token_id)
        if weighted:
            weights = [[word.weight for word in each] for each in words]
            tokens[weights_key] = _chunked(weights, max_token_length, 1.0, 1.0, 1.0)
    return tokens


def overlong(tokenizers: Sequence[Any], captions: Sequence[str], max_token_length: int, weighted: bool = False) -> list[int]:
    """How many tokens of each caption are beyond `max_token_length`; 0 for one that fits. Both encoders share one vocabulary.

    With `weighted`, brackets and weights are no words.
    """
    return [max(0, len(words) - max_token_length) for words in _words(tokenizers[0], captions, weighted)]


def encode_text(text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
    """`hidden_states` (batch, 75 * chunks + 2, width 1 + width 2) of both encoders, `pooled` (batch, projection) of the second.

    `hidden_states[-2]` of transformers is the output of the last layer but one, without the final norm, as SDXL was trained.
    The pooled vector is that of the first chunk. Weights multiply the hidden states of their words; the mean is not restored, and the
    pooled vector knows no weights (both as sd-scripts does).
    """
    outputs = [_encoded(encoder, tokens[key].flatten(0, 1)) for key, encoder in zip(IDS, text_encoders, strict=True)]
    states = [_rejoined(output.hidden_states[-2], tokens[key]) for key, output in zip(IDS, outputs, strict=True)]
    if WEIGHTS[0] in tokens:
        states = [state * _rejoined(tokens[key].to(state), tokens[key]) for key, state in zip(WEIGHTS, states, strict=True)]
    chunks = tokens[IDS[1]].shape[1]
    return {"hidden_states": torch.cat(states, dim=-1), "pooled": outputs[1].text_embeds[::chunks]}


class _Word(NamedTuple):
    id: int
    weight: float


def _words(tokenizer: Any, captions: Sequence[str], weighted: bool) -> list[list[_Word]]:
    """The token ids of each caption, uncut and without begin and end."""
    stretches = [emphasised(caption) if weighted else [Emphasised(caption, 1.0)] for caption in captions]
    texts = [clean(stretch.text) for each in stretches for stretch in each]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
    return [[_Word(id, stretch.weight) for stretch in each for id in next(ids)] for each in stretches]


def _tell_cut(words: Sequence[Sequence[_Word]], most: int) -> None:
    if any(len(each) > most for each in words):
        warn_once(logger, f"captions of more than {most} tokens are cut there; a larger --max_token_length (75, 150, 225) keeps more")


def _chunked(words: Sequence[Sequence[Number]], most: int, begin: Number, end: Number, padding: Number) -> Tensor:
    """What stands for the words of each caption, in chunks of 77 up to `most` words: (batch, chunks, 77), int64 or float32."""
    pieces = [each[start : start + CHUNK] for each in words for start in range(0, most, CHUNK)]
    rows = [[begin, *piece, end, *[padding] * (CHUNK - len(piece))] for piece in pieces]
    dtype = torch.float32 if isinstance(padding, float) else torch.int64
    return torch.tensor(rows, dtype=dtype).reshape(len(words), most // CHUNK, CHUNK + 2)


def _encoded(encoder: nn.Module, ids: Tensor) -> Any:
    return encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)


def _rejoined(states: Tensor, ids: Tensor) -> Tensor:
    """(batch * chunks, positions, width) to (batch, 75 * chunks + 2, width): the first begin, all words and padding, the last end."""
    batch, chunks, positions = ids.shape
    states = states.reshape(batch, chunks, positions, -1)
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
