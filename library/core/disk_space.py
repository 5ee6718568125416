"""Free space on disk: whether what is to be written fits, said before it is written."""

import shutil
from pathlib import Path

RESERVE = 64 * 2**20
"""Bytes that stay free on a disk beside what is written: logs and other programs need some."""


def shortage(folder: Path, needed: int, reserve: int = RESERVE) -> int:
    """How many bytes are missing for `needed` ones in a folder (or its nearest parent that is there) beside the reserve; 0 for none."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return max(0, needed + reserve - shutil.disk_usage(there).free)


def lacking(folder: Path, needed: int, what: str, reserve: int = RESERVE) -> str | None:
    """Half a sentence that says how much room is missing for `what` and where; None where it fits."""
    missing = shortage(folder, needed, reserve)
    if not missing:
        return None
    return (
        f"{what} needs {amount(needed)} in {folder}, and {amount(missing)} more must be free for it (with a reserve of {amount(reserve)})"
    )


def amount(size: int) -> str:
    """A number of bytes for a person: 12 KB, 3.4 MB, 1.2 GB, in powers of 1024."""
    number, unit = float(size), "bytes"
    for name in ("KB", "MB", "GB", "TB"):
        if number < 1024:
            break
        number, unit = number / 1024, name
    return f"{number:.0f} {unit}" if unit in ("bytes", "KB") else f"{number:.1f} {unit}"
