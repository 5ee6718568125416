"""Hashes of model files: what caches are named by, and what metadata says of the base model."""

from pathlib import Path

from library.core.file_hash import file_sha256, short_file_hash


def model_files(path: Path) -> list[Path]:
    """The file itself, or all safetensors files of a folder and their `config.json`. Raises `ValueError` where there are none."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no such file, and no folder with safetensors files")
    return [*files, *(sorted(path.rglob("config.json")) if path.is_dir() else [])]


def hash_entries(path: Path, what: str) -> dict[str, str]:
    """The metadata entries `ss_<what>_hash` and `ss_new_<what>_hash` of a file; none of a folder."""
    return {f"ss_{what}_hash": short_file_hash(path), f"ss_new_{what}_hash": file_sha256(path)} if path.is_file() else {}
