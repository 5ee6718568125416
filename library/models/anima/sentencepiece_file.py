"""T5's `spiece.model`, read without the sentencepiece library: a message in the wire format of protocol buffers.

Field numbers are those of sentencepiece_model.proto: pieces (1) with text (1), score (2) and type (3), and the normaliser (3) with its
table of characters (2).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # wire types
WIDTHS = {FIXED_64: 8, FIXED_32: 4}
PIECE, NORMALIZER = 1, 3
TEXT, SCORE, TYPE = 1, 2, 3
CHARACTERS = 2
UNKNOWN, CONTROL = 2, 3  # types of pieces
SENTINELS = 100  # T5 appends <extra_id_99> to <extra_id_0> to the pieces
SPACE = "\u2581"


def read_sentencepiece(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of T5 over these pieces. Raises `ValueError` for a file that is not such a model."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    try:
        pieces, types, characters = _model(path.read_bytes())
        unknown = types.index(UNKNOWN)
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from error
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(SENTINELS))]
    tokenizer = Tokenizer(Unigram([*pieces, *((name, 0.0) for name in sentinels)], unk_id=unknown, byte_fallback=False))
    if characters:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    whole = [text for (text, _), kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (*whole, *sentinels)])
    return tokenizer


def _model(message: bytes) -> tuple[list[tuple[str, float]], list[int], bytes]:
    """Pieces with their scores, their types, and the table of characters (empty where there is none)."""
    pieces, types, characters = [], [], b""
    for field, value in _fields(message):
        if field == PIECE:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(SCORE, bytes(4)))
            pieces.append((piece[TEXT].decode("utf-8"), score))
            types.append(piece.get(TYPE, 1))
        elif field == NORMALIZER:
            characters = dict(_fields(value)).get(CHARACTERS, b"")
    return pieces, types, characters


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: a whole number, or the bytes of anything else."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == VARINT:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if wire == BYTES:
            length, position = _varint(message, position)
        elif wire in WIDTHS:
            length = WIDTHS[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + length > len(message):
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, lowest first, and the position after it."""
    number, shift = 0, 0
    while True:
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, position
