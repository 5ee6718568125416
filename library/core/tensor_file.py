"""Tensor files: safetensors read with a checked header, written atomically.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` with string metadata under
`__metadata__`, then the tensor bytes (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.core.atomic import staged

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor: safetensors dtype name, shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # of its first byte, counted from the start of the file

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """The header of a tensor file: its tensors by name, in file order, and its string metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file without touching its tensors.

    Raises `ValueError` that names the file when it is missing, a pickle, truncated, or its header contradicts its size.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) >= 8 and starts_as_pickle(start):
            raise ValueError(f"{path}: a PyTorch pickle, not a safetensors file; convert it to .safetensors with a tool you trust")
        if len(start) < 8 or length < 2 or length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file (no valid header in {size} bytes)")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated; the header alone needs {8 + length} bytes, the file has {size}")
        file.seek(8)
        raw = file.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("the header is not a JSON object")
        metadata = _string_metadata(entries.pop("__metadata__", {}))
        tensors, end = _check_entries(entries, 8 + length)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: broken safetensors header: {error}") from error
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "longer than its header says"
        raise ValueError(f"{path}: {state}; it should have {8 + length + end} bytes and has {size}; copy or download it again")
    return Header(tensors, metadata)


def starts_as_pickle(start: bytes) -> bool:
    """Whether a file that begins with these 9 bytes is a pickle: a safetensors header may be 640 bytes long, which begins like one too."""
    is_header = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES
    return start.startswith(PICKLE_STARTS) and not is_header


def load_tensors(
    path: Path | str, names: Iterable[str] | None = None, device: str | torch.device = "cpu", *, header: Header | None = None
) -> dict[str, Tensor]:
    """Load the named tensors (all by default), memory-mapped, in their stored dtype.

    The header is checked first (`ValueError`), if it is not given as `read_header` has read it.
    """
    header = header or read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    missing = [name for name in wanted if name not in header.tensors]
    if missing:
        raise ValueError(f"{path}: has no tensor named {listing(missing)}")
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in wanted}


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; a full disk or a kill leaves an earlier file whole.

    Raises `ValueError` naming the path when the system refuses to write.
    """
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        with staged(path) as beside:
            beside.touch()
            mode = beside.stat().st_mode  # as the umask says; safetensors closes its files to all other users
            save_file(ready, str(beside), metadata=dict(metadata) if metadata else None)
            beside.chmod(mode)
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error}); an earlier file of that name is untouched") from error
    except Exception as error:  # safetensors wraps the system's errors in its own exception type
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path}: could not be written ({error}); an earlier file of that name is untouched") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of real numbers holds no infinity and no nan: by its extremes, at a tenth of the price of `torch.isfinite`."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.itemsize < 2 else tensor)  # nan is an extreme
    return math.isfinite(low) and math.isfinite(high)


def listing(names: Iterable[str], limit: int = 6) -> str:
    """Names for an error message: the first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def file_name(path: Path | str) -> str:
    """The file's name without its folder and extension, as metadata and logs show it."""
    return os.path.splitext(os.path.basename(os.fspath(path)))[0]


# Header checks


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name '{twice}' occurs twice")
    return table


def _string_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata must be a table of strings")
    return metadata


def _check_entries(entries: dict[str, dict], body: int) -> tuple[dict[str, TensorInfo], int]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPE_BITS:
            raise ValueError(f"tensor '{name}' has the unknown dtype {dtype}")
        if any(type(side) is not int or side < 0 for side in (*shape, begin, end)):
            raise ValueError(f"tensor '{name}' has an impossible shape or place")
        if end - begin != math.prod(shape) * DTYPE_BITS[dtype] // 8:
            raise ValueError(f"tensor '{name}' of shape {list(shape)} {dtype} cannot fill {end - begin} bytes")
        tensors[name] = TensorInfo(dtype, shape, body + begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"tensor '{name}' does not start where the one before it ends")
        position = end
    return tensors, position
