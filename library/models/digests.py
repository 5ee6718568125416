"""Hashes of model files: what caches are named by, and what metadata says of the base model."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from library.core.file_hash import file_sha256, sampled_file_hash, short_file_hash
from library.core.tensor_file import read_header

TENSOR_BYTES = 1 << 16  # of each tensor that count: a training or merge changes all of a matrix


def model_files(path: Path) -> list[Path]:
    """The file itself, or all safetensors files of a folder and their `config.json`. Raises `ValueError` where there are none."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no such file, and no folder with safetensors files")
    return [*files, *(sorted(path.rglob("config.json")) if path.is_dir() else [])]


def digest(facts: Iterable[object]) -> str:
    """SHA-256 of facts in their text form, one a line."""
    return hashlib.sha256("\n".join(map(str, facts)).encode("utf-8")).hexdigest()


def part_hash(path: Path, prefix: str) -> str:
    """A hash of the tensors of one file whose names start with `prefix`: of their names, shapes, and first 64 KiB each.

    The other parts of a checkpoint do not count. Where no tensor has the prefix, the file is one part (see `sampled_file_hash`).
    Raises `ValueError` for a file that is not a whole safetensors file.
    """
    tensors = {name: info for name, info in sorted(read_header(path).tensors.items()) if name.startswith(prefix)}
    if not tensors:
        return sampled_file_hash(path)
    found = hashlib.sha256()
    with path.open("rb") as file:
        for name, info in tensors.items():
            found.update(f"{name} {info.dtype} {info.shape}".encode())
            file.seek(info.start)
            found.update(file.read(min(info.size, TENSOR_BYTES)))
    return found.hexdigest()


def hash_entries(path: Path, what: str) -> dict[str, str]:
    """The metadata entries `ss_<what>_hash` and `ss_new_<what>_hash` of a file; none of a folder."""
    return {f"ss_{what}_hash": short_file_hash(path), f"ss_new_{what}_hash": file_sha256(path)} if path.is_file() else {}
