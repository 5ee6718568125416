"""The ends of image files: a cheap test for files that were cut off, without decoding them."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"  # PNG specification, 5.2 and 11.2.5
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"  # ITU T.81, table B.1
_MOST_BOXES = 1000


def tail_problem(path: Path) -> str | None:
    """Why the file looks cut off, or None: end marks of PNG and JPEG, lengths in the headers of WEBP, BMP and AVIF.

    A suspicion: data behind the end of a whole JPEG or PNG is suspected too, so decode the file before it is called broken.
    Kinds of files are told by their first bytes, as endings lie. Raises `OSError` where the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(32)
        length = file.seek(0, os.SEEK_END)
        if start.startswith(_PNG_START):
            return None if _last(file, length, 8) == _PNG_END else "it does not end as a PNG file does"
        if start.startswith(_JPEG_START):
            return None if _last(file, length, 64).rstrip(b"\0").endswith(_JPEG_END) else "it does not end as a JPEG file does"
        wanted = _stated_length(file, start, length)
    return f"it has {length} of {wanted} bytes" if wanted > length else None


def _last(file: BinaryIO, length: int, count: int) -> bytes:
    file.seek(max(0, length - count))
    return file.read(count)


def _stated_length(file: BinaryIO, start: bytes, length: int) -> int:
    """How long the file says it is; 0 where it does not."""
    if start[:4] == b"RIFF" and len(start) >= 8:
        return struct.unpack("<I", start[4:8])[0] + 8
    if start[:2] == b"BM" and len(start) >= 6:
        return struct.unpack("<I", start[2:6])[0]
    if start[4:8] == b"ftyp":
        return _end_of_boxes(file, length)
    return 0


def _end_of_boxes(file: BinaryIO, length: int) -> int:
    """Where the last box of an AVIF file ends (ISO/IEC 14496-12, 4.2): a box starts with its length and its kind."""
    end = 0
    for _ in range(_MOST_BOXES):
        file.seek(end)
        head = file.read(16)
        if len(head) < 8:
            break
        size = struct.unpack(">I", head[:4])[0]
        if size == 1 and len(head) == 16:  # the length did not fit in 4 bytes
            size = struct.unpack(">Q", head[8:])[0]
        if size < 8:  # 0: to the end of the file
            break
        end += size
        if end >= length:
            break
    return end
