"""What is known of the files of a folder: sizes, soundness, hashes. Kept beside them, so that a later run need not read them again."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.core.atomic import write_text
from library.core.file_hash import file_sha256
from library.core.log import get_logger, warn_once
from library.data.options import Size

logger = get_logger(__name__)

FOLDER = ".hadron_cache"
"""The folder, beside the images, of everything that is kept for later runs. It may be deleted at any time."""

FORMAT = 1  # raise it when a field of `Facts` gets another meaning


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one file, as long as its length and its time of change (nanoseconds) stay as they are."""

    length: int
    changed: int
    size: Size | None = None
    whole: bool = False  # the body was decoded too, without an error
    sha256: str | None = None


class FileIndex:
    """What is known of the files of one folder, kept in `.hadron_cache/files.json`. Safe for threads and for several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FOLDER / "files.json"
        self._facts = _read(self.path)
        self._changed = False

    def size(self, path: Path) -> Size | None:
        """Width and height of an image as remembered, or None. Raises `OSError` for a file that is not there."""
        return self._known(path).size

    def is_whole(self, path: Path) -> bool:
        """Was the image decoded to its end, as it is now? Raises `OSError` for a file that is not there."""
        return self._known(path).whole

    def remember_size(self, path: Path, size: Size, *, whole: bool) -> None:
        """Keep an image's width and height; `whole` says that its body was decoded too (which is not forgotten later)."""
        known = self._known(path)
        self._keep(path, replace(known, size=size, whole=whole or known.whole))

    def content_hash(self, path: Path) -> str:
        """SHA-256 of the file's bytes in hex, read where it is not known. Raises `OSError` for a file that cannot be read."""
        known = self._known(path)
        if known.sha256 is None:
            known = replace(known, sha256=file_sha256(path))
            self._keep(path, known)
        assert known.sha256 is not None
        return known.sha256

    def save(self) -> None:
        """Write what is new, with what other processes have written meanwhile, and without files that are gone.

        A folder that cannot be written to costs the memory only: that is said once.
        """
        if not self._changed:
            return
        there = {entry.name for entry in os.scandir(self.folder)}
        facts = {name: known for name, known in (_read(self.path) | self._facts).items() if name in there}
        rows = {name: [known.length, known.changed, known.size, known.whole, known.sha256] for name, known in sorted(facts.items())}
        try:
            write_text(self.path, json.dumps({"format": FORMAT, "files": rows}, separators=(",", ":")))
        except OSError as error:
            warn_once(logger, f"{self.path}: could not be written ({error.strerror or error}); the next run reads the images again")
        self._changed = False

    def _known(self, path: Path) -> Facts:
        """What is remembered of the file as it is now: all unknown where it has changed."""
        assert path.parent == self.folder, "a file of another folder"
        now = path.stat()
        known = self._facts.get(path.name)
        is_same = known is not None and (known.length, known.changed) == (now.st_size, now.st_mtime_ns)
        return known if known is not None and is_same else Facts(now.st_size, now.st_mtime_ns)

    def _keep(self, path: Path, facts: Facts) -> None:
        if self._facts.get(path.name) != facts:
            self._facts[path.name] = facts
            self._changed = True


# The file


def _read(path: Path) -> dict[str, Facts]:
    """The facts in a file; none from one that is missing, broken, or of another format: they can all be found again."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = table["files"].items() if table["format"] == FORMAT else ()
        return {name: _facts(*row) for name, row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.info("%s: not readable (%s); it is made anew", path, type(error).__name__)
        return {}


def _facts(length: Any, changed: Any, size: Any, whole: Any, sha256: Any) -> Facts:
    width, height = size or (0, 0)
    is_sound = all(type(number) is int for number in (length, changed, width, height)) and type(whole) is bool
    if not is_sound or not (sha256 is None or isinstance(sha256, str)):
        raise ValueError("a field of the wrong kind")
    return Facts(length, changed, (width, height) if size else None, whole, sha256)
