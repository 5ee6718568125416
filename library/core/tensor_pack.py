"""Tensors in one buffer, byte for byte as a safetensors file has them: cast, hashed and written once each.

For files that fit into memory beside their tensors. `tensor_stream` writes those that do not.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.core.atomic import staged
from library.core.tensor_stream import Entry, header_bytes, write_all

ORDER = (
    torch.uint64, torch.int64, torch.float64, torch.float32, torch.uint32, torch.int32, torch.bfloat16, torch.float16, torch.uint16,
    torch.int16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
"""In which safetensors writes the dtypes; within one, tensors stand in the order of their names."""


@dataclass(frozen=True)
class Packed:
    """The content of a file: what its header says of the tensors, and their bytes."""

    entries: list[Entry]
    body: Tensor  # (bytes,) of uint8, on the CPU

    def header(self, metadata: Mapping[str, str] | None) -> bytes:
        """What stands before the body: with metadata, if only an empty table, or for None without."""
        return header_bytes(self.entries, metadata)

    def body_sha256(self) -> str:
        """SHA-256 of the bytes after the header, in hex."""
        return hashlib.sha256(self._bytes).hexdigest()

    def part(self, metadata: Mapping[str, str] | None, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of the file that has this metadata."""
        header = self.header(metadata)
        own = slice(max(0, start - len(header)), max(0, stop - len(header)))
        return header[start:stop] + self._bytes[own].tobytes()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in file order, as views of the body."""
        views, position = {}, 0
        for entry in self.entries:
            views[entry.name] = self.body[position : position + entry.size].view(entry.dtype).view(entry.shape)
            position += entry.size
        return views

    def write(self, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
        """Write the file atomically. Raises `ValueError` naming the path when the system refuses."""
        try:
            with staged(path) as beside, beside.open("xb", buffering=0) as file:
                write_all(file, self.header(metadata))
                write_all(file, self._bytes)
        except OSError as error:
            raise ValueError(
                f"{path}: could not be written ({error.strerror or error}); an earlier file of that name is untouched"
            ) from error

    @property
    def _bytes(self) -> memoryview:
        return self.body.numpy().data


def pack(tensors: Mapping[str, Tensor], dtype_of: Callable[[str, Tensor], torch.dtype]) -> Packed:
    """Gather tensors from any device in the dtypes that `dtype_of` says. Raises `ValueError` for a dtype that safetensors has not."""
    entries = [Entry(name, dtype_of(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    foreign = [entry for entry in entries if entry.dtype not in ORDER]
    if foreign:
        raise ValueError(f"tensor '{foreign[0].name}' is of {foreign[0].dtype}, which safetensors files do not hold")
    entries.sort(key=lambda entry: (ORDER.index(entry.dtype), entry.name))
    packed = Packed(entries, torch.empty(sum(entry.size for entry in entries), dtype=torch.uint8))
    with torch.no_grad():
        for name, place in packed.tensors().items():
            place.copy_(tensors[name])
    return packed
