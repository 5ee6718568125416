"""The folders that a run writes to and reads from: free space and speed."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from library.core.atomic import writable_folder
from tools.health.finding import Finding, Patient, fail, first_line, gigabytes, ok, warn

SAMPLE = 32 * 2**20  # bytes that are written and read
SLOW = 20 * 2**20  # bytes a second
LITTLE = 5 * 2**30  # bytes


def disks(patient: Patient) -> Iterator[Finding]:
    """Every folder once."""
    yield from (_folder(folder) for folder in dict.fromkeys(patient.folders))


def _folder(folder: Path) -> Finding:
    subject = f"folder {folder}"
    was_there = folder.exists()
    try:
        writable_folder(folder, "folder")
        free = shutil.disk_usage(folder).free
        if free < 2 * SAMPLE:
            return fail(subject, f"only {gigabytes(free)} free", "make room, or choose another folder")
        written, read = _speeds(folder / f".doctor-{os.getpid()}")
    except (OSError, ValueError) as error:
        return fail(subject, first_line(error), "give a folder that you may write to, on a disk with room")
    finally:
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    text = f"{gigabytes(free)} free; writes {written / 2**20:.0f} MB/s with fsync, reads {read / 2**20:.0f} MB/s"
    if free < LITTLE:
        return warn(subject, text, "adapters, states and caches may not all fit: make room")
    if min(written, read) < SLOW:
        return warn(subject, text, "saving will hold training up: use a local disk")
    return ok(subject, text)


def _speeds(file: Path) -> tuple[float, float]:
    """Bytes a second of writing until they are safe, and of reading them; the system may still hold them in memory."""
    content = os.urandom(SAMPLE)
    try:
        started = time.perf_counter()
        with file.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        written = time.perf_counter() - started
        _forget(file)
        started = time.perf_counter()
        if file.read_bytes() != content:
            raise OSError("reads other bytes than were written: this disk cannot be trusted")
        return SAMPLE / written, SAMPLE / (time.perf_counter() - started)
    finally:
        file.unlink(missing_ok=True)


def _forget(file: Path) -> None:
    """Ask the system to drop the file from memory, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
