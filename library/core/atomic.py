"""Atomic files: written beside their place, synced, renamed. A reader sees the old file or the new one, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def staged(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is fsynced and renamed to `path`, on any error removed.

    The folder is made if missing. An earlier file at `path` stays whole until the rename. Raises `OSError` as the system does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with staged(path) as beside:
        beside.write_text(text, encoding="utf-8")


def writable_folder(path: Path | str, where: str) -> Path:
    """The folder `path`, made if missing and proved writable now rather than after hours; `where` names the option in the error.

    Raises `ValueError` when it is a file, cannot be made, or cannot be written to.
    """
    folder = Path(path)
    probe = folder / f".write-test-{uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{where} {folder}: cannot write there ({error.strerror or error}); give a folder you may write to") from error
    return folder


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write a folder's own entries, such as a rename in it, to the disk."""
    if os.name == "nt":  # Windows cannot open a folder to sync it; its rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
