"""Ctrl+C and SIGTERM: the step in progress is finished and the run's state saved before the run ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from library.core.log import get_logger

logger = get_logger(__name__)

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not failed, to be taken up again later
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether this process was asked to end, and whether the run ends for it: of several ranks none may before all of them know."""

    def __init__(self, processes: int = 1) -> None:
        self.asked = False  # this process, by a signal
        self._alone, self._agreed = processes == 1, False

    @property
    def ends_run(self) -> bool:
        """Whether the run ends after the step in progress; the same on all ranks."""
        return self.asked if self._alone else self._agreed

    def agree(self, asked: bool) -> None:
        """Note what all ranks have told each other: whether any of them was asked to end."""
        self._agreed = self._agreed or asked

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within it the first signal is noted, and a second Ctrl+C ends the run at once. Outside the main thread none arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("%s: the run ends after this step; Ctrl+C once more ends it now", signal.Signals(number).name)
