"""The log of a run: one JSON object a line, always written, flushed line by line."""

import json
import math
import os
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from library.core.clock import now
from library.core.log import get_logger

logger = get_logger(__name__)

NAME = "log.jsonl"


class RunLog:
    """`<run folder>/log.jsonl`, written by one process; the others hold one that does nothing.

    A line of figures has `step`, `epoch`, `seconds` (since the run began, over all its sessions) and the figures by tracker key; a line
    of an event has `event` in place of figures. Numbers that are not finite are texts ("nan", "inf", "-inf"). Without `rewind` the first
    line begins a new log, and that of an earlier run stays beside it as `log-1.jsonl`. A full disk costs lines, not the run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._lost = 0  # lines in a row that could not be written
        self._before, self._start = 0.0, time.monotonic()  # seconds of earlier sessions, and when this one began

    @classmethod
    def open(cls, folder: Path, is_main: bool) -> "RunLog":
        """The log in a run's folder. Nothing is written or moved before the first line, so that `rewind` may come first."""
        return cls(folder / NAME if is_main else None)

    def record(self, step: int, epoch: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step."""
        if figures:
            self._write({"step": step, "epoch": epoch, "seconds": self._seconds(), **figures})

    def event(self, event: str, step: int, epoch: int, **facts: Any) -> None:
        """Write what happened: `saved`, `previews`, `left_out`, ... with facts that JSON can hold."""
        self._write({"event": event, "step": step, "epoch": epoch, "seconds": self._seconds(), **facts})

    def mark(self) -> int:
        """The length of the log in bytes, once all of it is on the disk: what a saved state keeps for `rewind`."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def rewind(self, step: int, length: int | None = None) -> None:
        """Go on with the log of an earlier session, from `length` (of `mark`); without it, or in another file, after the lines of `step`.

        To be called before the first line. A line that was cut off goes too.
        """
        if self.path is None or not self.path.is_file():
            return
        content = self.path.read_bytes()
        if length is None or length > len(content) or (length and content[length - 1 : length] != b"\n"):
            length = _length_up_to(content, step)
        with self.path.open("rb+") as file:
            file.truncate(length)
            os.fsync(file.fileno())
        self._before = _last_seconds(content[:length])
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Write all to the disk."""
        if self._file is not None:
            self.mark()
            self._file.close()
            self._file = None

    # Lines

    def _seconds(self) -> float:
        return round(self._before + time.monotonic() - self._start, 3)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                self._file = self._begun(self.path)
            length = self._file.seek(0, os.SEEK_END)
            try:
                _write_whole(self._file, (json.dumps(_finite(entry)) + "\n").encode())
            except OSError:
                self._file.truncate(length)
                raise
        except OSError as error:
            if self._lost == 0:
                logger.warning("%s: a line could not be written (%s); the run goes on", self.path, error.strerror or error)
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            logger.warning("%s: can be written again; %d lines are missing", self.path, lost)
            self.event("log_lines_lost", entry["step"], entry["epoch"], lines=lost)

    def _begun(self, path: Path) -> BinaryIO:
        """The file of a new log, with its first line; an earlier one is moved aside."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            aside = next(place for number in count(1) if not (place := path.with_stem(f"{path.stem}-{number}")).exists())
            path.rename(aside)
            logger.info("%s is of an earlier run and is kept as %s", path, aside.name)
        file = path.open("ab", buffering=0)
        _write_whole(file, (json.dumps({"event": "begun", "step": 0, "epoch": 1, "seconds": 0.0, "time": now()}) + "\n").encode())
        return file


def _write_whole(file: BinaryIO, line: bytes) -> None:
    """Write all of a line: a raw file may take a part and say how much."""
    while line:
        line = line[file.write(line) :]


def _finite(entry: Any) -> Any:
    """The same with numbers that JSON knows."""
    if isinstance(entry, Mapping):
        return {key: _finite(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [_finite(value) for value in entry]
    return str(entry) if isinstance(entry, float) and not math.isfinite(entry) else entry


def _length_up_to(content: bytes, step: int) -> int:
    """How many bytes come before the first line that is of a later step, or damaged."""
    length = 0
    for line in content.splitlines(keepends=True):
        entry = _read(line)
        if entry is None or entry.get("step", 0) > step:
            break
        length += len(line)
    return length


def _last_seconds(content: bytes) -> float:
    entries = (_read(line) for line in reversed(content.splitlines(keepends=True)))
    return next((float(entry["seconds"]) for entry in entries if entry is not None and "seconds" in entry), 0.0)


def _read(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
