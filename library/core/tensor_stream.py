"""Safetensors files read and written one tensor at a time, so that memory holds one tensor and not the file.

safetensors' own writer takes all tensors at once. Here the header is made from names, dtypes and shapes that are known before.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from library.core.atomic import staged
from library.core.tensor_file import MAX_HEADER_BYTES, TensorInfo, read_header

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the first tensor's bytes


class TensorReader:
    """The tensors of a safetensors file, each read into memory of its own when asked for. Close it, or use it in a `with`.

    Raises `ValueError` as `read_header` does.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.header = read_header(path)
        self._file = self.path.open("rb", buffering=0)

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the header says of each tensor, in the order of their bytes."""
        return dict(sorted(self.header.tensors.items(), key=lambda entry: entry[1].start))

    def read(self, name: str) -> Tensor:
        """The tensor `name`, writable. Raises `ValueError` where the file has become shorter."""
        info = self.header.tensors[name]
        content = torch.empty(info.size, dtype=torch.uint8)
        self._fill(content.numpy().data, info)
        return content.view(DTYPES[info.dtype]).reshape(info.shape) if info.size else torch.empty(info.shape, dtype=DTYPES[info.dtype])

    def _fill(self, content: memoryview, info: TensorInfo) -> None:
        self._file.seek(info.start)
        done = 0
        while done < len(content):
            count = self._file.readinto(content[done:])
            if not count:
                raise ValueError(f"{self.path}: ended while it was read; it was changed or cut meanwhile")
            done += count


@dataclass(frozen=True)
class Entry:
    """A tensor to come: what the header will say of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """A file that was written: its size in bytes and the SHA-256 of all of it."""

    path: Path
    size: int
    sha256: str


def write_stream(
    path: Path | str,
    entries: Iterable[Entry],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    body_hash: str | None = None,
) -> Written:
    """Write a safetensors file atomically: `tensors` gives those of `entries`, in order, and is asked for one at a time.

    `body_hash` names a metadata entry that gets `0x` and the SHA-256 of all bytes after the header (modelspec.hash_sha256). Entries with
    wider elements should stand first, as safetensors writes them: then every tensor is aligned. Raises `ValueError` naming the path
    where the system refuses, and for tensors that are not what their entry says.
    """
    entries = list(entries)
    described = dict(metadata or {}) | ({body_hash: _hash_text(hashlib.sha256())} if body_hash else {})
    header = header_bytes(entries, described or None)
    whole, body = hashlib.sha256(header), hashlib.sha256()
    try:
        with staged(path) as beside:
            with beside.open("xb", buffering=0) as file:
                write_all(file, header)
                _stream(file, body if body_hash else whole, _contents(entries, tensors))
                if body_hash:
                    file.seek(0)
                    write_all(file, header_bytes(entries, described | {body_hash: _hash_text(body)}))
            if body_hash:
                with beside.open("rb") as again:
                    whole = hashlib.file_digest(again, "sha256")
            size = beside.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error}); an earlier file of that name is untouched") from error
    return Written(Path(path), size, whole.hexdigest())


def aligned(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with wider elements first, otherwise in their order."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The header of a file with these entries, its length before it; without a table of metadata for None.

    Raises `ValueError` for a name given twice, and for more than safetensors allows.
    """
    table: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        end = position + entry.size
        if entry.name in table:
            raise ValueError(f"the name '{entry.name}' occurs twice")
        table[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is longer than safetensors allows ({MAX_HEADER_BYTES})")
    return len(text).to_bytes(8, "little") + text


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write a whole content to an unbuffered file."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]  # the system may take less than all, 2 GiB at most


def _contents(entries: list[Entry], tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    for entry, tensor in zip(entries, tensors, strict=True):
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"tensor '{entry.name}' is {found}; its entry says {entry.dtype} {list(entry.shape)}")
        yield tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data


def _stream(file: FileIO, digest: "hashlib._Hash", contents: Iterator[memoryview]) -> None:
    """Write and hash each content while the next is made: at most two are in memory."""

    def put(content: memoryview) -> None:
        write_all(file, content)
        digest.update(content)

    with ThreadPoolExecutor(1) as writer:
        pending = None
        for content in contents:
            if pending is not None:
                pending.result()
            pending = writer.submit(put, content)
        if pending is not None:
            pending.result()


def _hash_text(digest: "hashlib._Hash") -> str:
    return f"0x{digest.hexdigest()}"
