"""Prompts from the keyboard, one after the other."""

from collections.abc import Callable

import torch

from library.core.log import get_logger

logger = get_logger(__name__)
ENDS = ("\x04", "\x1a")  # Ctrl-D and Ctrl-Z where a terminal passes them on


def converse(draw: Callable[[str], object]) -> None:
    """Draw line after line until an empty one, the end of input or Ctrl-C there.

    A line that cannot be drawn is said, and the next asked for; so is one whose drawing Ctrl-C stops.
    """
    logger.info("one prompt a line; an empty line or the end of input ends")
    while line := _next():
        try:
            draw(line)
        except ValueError as error:
            for problem in str(error).splitlines():
                logger.error("%s", problem)
        except torch.OutOfMemoryError as error:
            logger.error("too large for the device's memory: %s", str(error).splitlines()[0])
        except KeyboardInterrupt:
            logger.warning("interrupted")


def _next() -> str:
    try:
        line = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
    return "" if line in ENDS else line
