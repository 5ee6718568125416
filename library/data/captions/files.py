"""Caption files: which one belongs to an image, and the text in it."""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

from library.core.log import get_logger, warn_once
from library.data.images.crops import FACE_IN_NAME

logger = get_logger(__name__)

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_OTHER_ENCODINGS = {"shift_jis": "Shift-JIS", "gb18030": "GB 18030", "cp1252": "Latin-1"}


def caption_file(image: Path, endings: Iterable[str]) -> Path | None:
    """The caption file of an image: its name with the first of the endings that is there.

    Where there is none, the name without the place of a face at its end: `portrait_120_96_80_80.png` reads `portrait.txt`.
    """
    endings = tuple(endings)
    stems = dict.fromkeys((image.stem, FACE_IN_NAME.sub("", image.stem) or image.stem))
    paths = (image.with_name(stem + ending) for stem in stems for ending in endings)
    return next((path for path in paths if path.is_file()), None)


def read_caption(path: Path, every_line: bool) -> str:
    """The caption in a file: its first line with text, or all of them where wildcards draw a line.

    UTF-16 and UTF-32 are read where a byte-order mark says so, with one warning a folder. Raises `ValueError` that names the file
    when it is in another encoding than these and UTF-8, or holds no text.
    """
    try:
        text, encoding = decoded(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if encoding != "utf-8":
        warn_once(logger, f"{path.parent}: has captions in {encoding[:6].upper()}; they are read, but save them as UTF-8 for other tools")
    lines = caption_lines(text)
    if not lines:
        raise ValueError(f"{path}: holds no text; write a caption into it, or delete it to use class_tokens")
    return "\n".join(lines) if every_line else lines[0]


def caption_lines(text: str) -> list[str]:
    """The lines with text, without space around them."""
    lines = re.split(r"\r\n?|\n", text)  # `splitlines` would also cut at form feeds and the like
    return [line.strip() for line in lines if line.strip()]


def decoded(data: bytes) -> tuple[str, str]:
    """The text in the bytes of a file, without a byte-order mark, and its encoding (`utf-8`, `utf-16-le` and the like).

    Raises `ValueError` with the first byte that is wrong and the encodings that the bytes may be in.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"not {encoding[:6].upper()} text ({error.reason} at byte {error.start + len(mark)})"
        raise ValueError(f"{reason}, {_may_be(data)}" if not mark else reason) from error
    if not mark and "\0" in text:
        raise ValueError("not UTF-8 text (has zero bytes), perhaps UTF-16 without a byte-order mark")
    return text, encoding


def _may_be(data: bytes) -> str:
    fitting = [name for encoding, name in _OTHER_ENCODINGS.items() if _decodes(data, encoding)]
    return f"perhaps {' or '.join(fitting)}" if fitting else "nor in a common encoding"


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
