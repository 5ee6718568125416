"""A training script in this process, which notes the instants it passes and kills itself at a chosen one.

    python -m benchmarks.kill_driver FAMILY TRACE NUMBER OPTIONS...

It is the shipped script's `main`. Each line of the file TRACE is an instant: its phase, and what begins or ended there. At instant NUMBER
(from 0; -1 for none) the process gets SIGKILL, which nothing in it can hear.
"""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate

from library.core.command_line import run_script
from library.inference.generate import Generator
from library.training import moments, run, setup, update

SETTING_UP = "setting up"
PHASES: dict[str, tuple[Any, str]] = {
    "caching": (setup, "fill_caches"),
    "stepping": (run, "update"),
    "saving the network": (moments, "save"),
    "saving the state": (moments, "keep_state"),
    "validating": (moments, "measure_validation"),
    "sampling": (moments, "preview"),
}
"""What a run is doing while a function is called."""
CALLS: dict[str, tuple[Any, str]] = {
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
    "folder rename": (os, "rename"),
    "removal": (os, "unlink"),
    "folder": (os, "mkdir"),
    "forward": (update, "batch_loss"),
    "backward": (accelerate.Accelerator, "backward"),
    "sampler": (Generator, "sample"),
    "decoding": (Generator, "decode"),
}
"""Calls of which beginning and end are instants."""


class Instants:
    """Counts the instants of this process, writes each down, and ends the process at one of them."""

    def __init__(self, trace: Path, last: int) -> None:
        self._file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._left = last
        self._process = os.getpid()
        self._phases = [SETTING_UP]

    def pass_by(self, what: str) -> None:
        """Note an instant; where it is the chosen one, nothing comes after it. Processes that read images have none."""
        if os.getpid() != self._process:
            return
        os.write(self._file, f"{self._phases[-1]}\t{what}\n".encode())
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is called within it belongs to a phase."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def watch(self) -> None:
        """Note the calls of this module's tables from now on."""
        for phase, (owner, name) in PHASES.items():
            setattr(owner, name, self._in_phase(phase, getattr(owner, name)))
        for what, (owner, name) in CALLS.items():
            setattr(owner, name, self._noted(what, getattr(owner, name)))

    def _in_phase(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*given: Any, **named: Any) -> Any:
            with self.phase(phase):
                return function(*given, **named)

        return called

    def _noted(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*given: Any, **named: Any) -> Any:
            self.pass_by(f"{what} begins")
            result = function(*given, **named)
            self.pass_by(f"{what} ended")
            return result

        return called


def main(argv: list[str]) -> None:
    """Run the script of a family, watched."""
    family, trace, number, *options = argv
    Instants(Path(trace), int(number)).watch()
    run.main(family, options)


if __name__ == "__main__":
    run_script(main)
