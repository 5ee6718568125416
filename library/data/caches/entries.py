"""Entries of the caches on disk: one small tensor file each, with a checksum, in the folder `.hadron_cache` beside the images."""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from library.core.log import get_logger
from library.core.tensor_file import Header, TensorInfo, read_header
from library.core.tensor_pack import pack
from library.core.tensor_stream import CODES, DTYPES
from library.data.caches.rounds import each
from library.data.file_index import FOLDER

logger = get_logger(__name__)
FORMAT = 2  # raise it when the content of entries changes
KEY_BYTES = 16
CHECKSUM = "crc32"
LEFT_BEHIND = 3600  # seconds after which a temporary file belongs to a process that was killed

Item = TypeVar("Item", bound=Hashable)
State = Literal["found", "missing", "broken"]


@dataclass(frozen=True)
class Entry:
    """An entry as read: its tensors, and the facts written with them."""

    tensors: dict[str, Tensor]
    facts: dict[str, str]


def key_of(**parts: object) -> bytes:
    """`KEY_BYTES` that stand for everything an entry depends on."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).digest()[:KEY_BYTES]


def entry_path(folder: Path, kind: str, key: bytes) -> Path:
    """The file of an entry of images in `folder`."""
    return folder / FOLDER / f"{kind}-{key.hex()}.safetensors"


def write_entry(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write an entry atomically, with a checksum. Raises `ValueError` naming the path where the system refuses."""
    packed = pack(tensors, lambda _, tensor: tensor.dtype)
    said = [(entry.name, CODES[entry.dtype], tuple(entry.shape)) for entry in packed.entries]
    try:
        packed.write(path, {**facts, CHECKSUM: _checksum(packed.body.numpy().data, said, facts)})
    except ValueError as error:
        raise ValueError(f"{error}; mend that, or keep the cache in memory: the option without _to_disk") from error


def read_entry(path: Path) -> Entry:
    """An entry, its checksum compared.

    Raises `ValueError` for one that is missing or damaged; it is removed, so that the next start encodes it anew.
    """
    try:
        return _read(path)
    except (ValueError, OSError):
        with suppress(ValueError, OSError):
            return _read(path)  # another process may have put a sound one into its place just now
        reason = _damage(path)
        with suppress(OSError):
            path.unlink()
        raise ValueError(f"{path}: this entry of the cache is damaged ({reason}); the next start encodes it anew") from None


def states(paths: Iterable[Path], *, check: bool) -> list[State]:
    """Of each path: `found`, `missing`, or `broken` by its header or length. Without `check`, whatever exists is found."""
    paths = list(paths)
    there = {folder: _names(folder) for folder in {path.parent for path in paths}}
    exists = [path.name in there[path.parent] for path in paths]
    if not check:
        return ["found" if it else "missing" for it in exists]
    sound = iter(each(_is_sound, [path for path, it in zip(paths, exists, strict=True) if it]))
    return [("found" if next(sound) else "broken") if it else "missing" for it in exists]


def is_wanted(path: Path, *, check: bool) -> bool:
    """Is there still no file, or with `check` no sound one? Nothing is removed for a better one: others may read at any time."""
    return not _is_sound(path) if check else not path.exists()


def clean(folders: Iterable[Path]) -> None:
    """Remove the temporary files that killed processes have left in the caches of these folders."""
    for folder in set(folders):
        for path in (folder / FOLDER).glob(".*.part"):
            with suppress(OSError):  # another process may do the same
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    path.unlink()


# One file


def _read(path: Path) -> Entry:
    header = read_header(path)
    raw = bytearray(path.read_bytes())
    body = min((info.start for info in header.tensors.values()), default=len(raw))
    facts = {name: value for name, value in header.metadata.items() if name != CHECKSUM}
    found, wanted = _checksum(memoryview(raw)[body:], _said(header), facts), header.metadata.get(CHECKSUM)
    if found != wanted:
        raise ValueError(f"{path}: its checksum is {found} and not {wanted}")
    return Entry({name: _tensor(raw, info) for name, info in header.tensors.items()}, facts)


def _said(header: Header) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, info.dtype, info.shape) for name, info in header.tensors.items()]


def _tensor(raw: bytearray, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    if not info.size:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8, count=info.size, offset=info.start).view(dtype).view(info.shape)


def _checksum(body: memoryview, said: list[tuple[str, str, tuple[int, ...]]], facts: Mapping[str, str]) -> str:
    """CRC-32 of the tensors' bytes, then of their names, dtypes and shapes, then of the facts, in hex."""
    text = json.dumps([sorted(said), sorted(facts.items())])
    return f"{zlib.crc32(text.encode('utf-8'), zlib.crc32(body)):08x}"


def _damage(path: Path) -> str:
    try:
        _read(path)
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")
    return "it was replaced while it was read"


def _is_sound(path: Path) -> bool:
    try:
        return CHECKSUM in read_header(path).metadata
    except (ValueError, OSError):
        return False


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ValueError(f"{folder}: the cache cannot be read ({error.strerror or error})") from error
