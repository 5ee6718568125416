"""Trees of plain values and tensors, as JSON and tensors by name and back with the very same bits: states without pickles.

Lists, `None`, booleans, texts, whole and finite numbers are JSON as they are (JSON's numbers hold all bits of a float). All else is an
object with one key that says what it is: `{"table": {...}}`, `{"tuple": [...]}`, `{"tensor": "name"}`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.core.tensor_stream import CODES, Entry, TensorReader, Written, aligned, write_stream

Json = Any
PLAIN = (bool, int, str, type(None))


class _Packer:
    """Turns a tree into JSON and collects its tensors; one that stands in two places is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def json(self, value: Any, path: str) -> Json:
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), path)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if type(value) in PLAIN:
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, list | tuple):
            items = [self.json(item, f"{path}.{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        raise ValueError(f"{path}: a {type(value).__module__}.{type(value).__qualname__} cannot be kept without a pickle")

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Json:
        if isinstance(value, Counter) or not all(type(key) is str for key in value):
            pairs = [[self.json(key, path), self.json(item, f"{path}.{key}")] for key, item in value.items()]
            return {"counter" if isinstance(value, Counter) else "dict": pairs}
        return {"table": {key: self.json(item, f"{path}.{key}") for key, item in value.items()}}

    def _tensor(self, tensor: Tensor, path: str) -> Json:
        if tensor.layout != torch.strided or tensor.dtype not in CODES:
            raise ValueError(f"{path}: a {tensor.layout} tensor of {tensor.dtype} cannot be kept in a safetensors file")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        name = self._names.get(place) if tensor.numel() else None
        if name is None:
            name = path if path not in self.tensors else f"{path}#{len(self.tensors)}"
            self.tensors[name] = tensor
            self._names[place] = name
        strides = {} if tensor.is_contiguous() or not _is_dense(tensor) else {"strides": list(tensor.stride())}
        return {"tensor": name, **strides}


def packed(tree: Any, name: str) -> tuple[Json, dict[str, Tensor]]:
    """A tree as JSON and its tensors, whose names begin with `name`. Raises `ValueError` naming the place of what no file can hold."""
    packer = _Packer()
    return packer.json(tree, name), packer.tensors


def unpacked(json: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `packed` was given. Raises `ValueError` for JSON that it did not make."""
    if isinstance(json, list):
        return [unpacked(item, tensors) for item in json]
    if not isinstance(json, dict):
        return json
    [(kind, value), *rest] = json.items()
    if kind == "tensor" and value in tensors:
        return tensors[value] if not rest else _strided(tensors[value], dict(rest)["strides"])
    if kind == "table":
        return {key: unpacked(item, tensors) for key, item in value.items()}
    if kind in ("dict", "counter"):
        table = {unpacked(key, tensors): unpacked(item, tensors) for key, item in value}
        return Counter(table) if kind == "counter" else table
    if kind == "tuple":
        return tuple(unpacked(item, tensors) for item in value)
    if kind == "float":
        return float(value)
    if kind == "dtype" and isinstance(dtype := getattr(torch, value, None), torch.dtype):
        return dtype
    raise ValueError(f"'{kind}' {value!r} is nothing that a state can hold")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write tensors as they are into a safetensors file, atomically. Raises `ValueError` where the system refuses."""
    entries = aligned(Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    return write_stream(path, entries, (tensors[entry.name] for entry in entries))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own. Raises `ValueError` as `read_header` does."""
    with TensorReader(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def _is_dense(tensor: Tensor) -> bool:
    """Are its elements in one piece of memory, each once, in another order than that of its dimensions?"""
    expected = 1
    for stride, side in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if side != 1 and stride != expected:
            return False
        expected *= side
    return True


def _strided(tensor: Tensor, strides: list[int]) -> Tensor:
    return torch.empty_strided(tuple(tensor.shape), strides, dtype=tensor.dtype).copy_(tensor)
