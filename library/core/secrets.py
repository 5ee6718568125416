"""Tokens and keys: kept out of everything that is written or shown."""

import ctypes
import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path

MASK = "***"
SHORTEST = 6  # letters; what is shorter is no token, and would be found in harmless words
ARGUMENTS_START, ARGUMENTS_END = 47, 48  # fields of /proc/self/stat, counted from 0 (proc(5): arg_start, arg_end)
SIGNED_LINK = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]+")

_secrets: set[str] = set()


def keep_secret(values: Iterable[str | None]) -> None:
    """From now on `hidden` leaves these values out; they also leave `sys.argv` and, on Linux, the process's title.

    Trackers write `sys.argv` down, and other users of a machine see titles.
    """
    _secrets.update(value for value in values if value and len(value) >= SHORTEST)
    sys.argv[:] = map(hidden, sys.argv)
    _hide_in_title()


def hidden(text: str) -> str:
    """`text` with every secret masked, and without the queries of links, which may be signed."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return SIGNED_LINK.sub(rf"\1?{MASK}", text)


class HidingFormatter(logging.Formatter):
    """Log lines, with their tracebacks, as `hidden` leaves them."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def _hide_in_title() -> None:
    """Overwrite secrets where the kernel reads this process's command line, with as many letters; nothing elsewhere than on Linux."""
    stat = Path("/proc/self/stat")
    if not _secrets or not stat.is_file():
        return
    fields = stat.read_text().rpartition(")")[2].split()  # the name before it, in brackets, may hold spaces
    start, end = (int(fields[index - 2]) for index in (ARGUMENTS_START, ARGUMENTS_END))
    if not 0 < start < end:  # kept from us, as some sandboxes do
        return
    line = ctypes.string_at(start, end - start)
    for secret in (value.encode() for value in _secrets):
        place = line.find(secret)
        while place >= 0:
            ctypes.memset(start + place, ord("*"), len(secret))
            place = line.find(secret, place + len(secret))
