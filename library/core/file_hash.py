"""Hashes of files: whole, in A1111's short form, and sampled for files too large to read for every question."""

import hashlib
from pathlib import Path

CHUNK = 1 << 20
SAMPLES = 256  # of CHUNK / 4 bytes each: 64 MiB of a larger file are read


def file_sha256(path: Path | str) -> str:
    """SHA-256 of the whole file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_file_hash(path: Path | str) -> str:
    """The first 8 hex digits of SHA-256 over the 64 KiB at offset 1 MiB: the old model hash of stable-diffusion-webui."""
    with Path(path).open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def sampled_file_hash(path: Path | str) -> str:
    """SHA-256 of the size and of evenly spread samples (of everything up to 64 MiB), whatever the file's name and dates.

    Sees every other training of a model and every other header; may miss a change of single small tensors in a large file.
    """
    path = Path(path)
    size = path.stat().st_size
    length = CHUNK // 4
    if size <= SAMPLES * length:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode("ascii"))
    with path.open("rb") as file:
        for n in range(SAMPLES):
            file.seek(n * (size - length) // (SAMPLES - 1))
            digest.update(file.read(length))
    return digest.hexdigest()
