"""Logging: one logger, short lines, warnings said once."""

import logging
import sys
from pathlib import Path

from library.core.secrets import HidingFormatter

ROOT_LOGGER = logging.getLogger("hadron")
"""The logger above all of ours."""

_said: set[str] = set()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `logger = get_logger(__name__)`."""
    return ROOT_LOGGER.getChild(name)


def set_up_logging(level: str = "INFO", file: str | None = None, is_main: bool = True, simple: bool = False) -> None:
    """Send log lines to stderr, and to `file` where given; other processes than the main one only report warnings.

    `simple` lines on stderr are the message alone, without time and level.
    """
    root = ROOT_LOGGER
    root.setLevel(level if is_main else "WARNING")
    root.propagate = False
    root.handlers.clear()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and is_main:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(HidingFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    if simple:
        handlers[0].setFormatter(HidingFormatter("%(message)s"))


def warn_once(logger: logging.Logger, message: str) -> None:
    """Warn, but not twice with the same words in one process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)
