"""How fast a run is, and how much memory it takes."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")
GIB = 2**30


class Stopwatch:
    """The seconds of a step: from asking for its first batch to its end. What is done between steps, such as saving, does not count."""

    def __init__(self, processes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.samples = 0  # seen by all processes since the run began
        self._processes, self._clock = processes, clock
        self._begun: float | None = None
        self._waited = 0.0
        self._images = 0

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; how long each was waited for is counted."""
        source = iter(batches)
        while True:
            asked = self._clock()
            if self._begun is None:
                self._begun = asked
            try:
                batch = next(source)
            except StopIteration:
                self._begun = None
                return
            self._waited += self._clock() - asked
            yield batch

    def count(self, images: int) -> None:
        """Count the images of a batch of this process; the others' batches are taken to have as many."""
        self._images += images * self._processes

    def stop(self) -> dict[str, float]:
        """The step is over: its figures by tracker key, in seconds and images."""
        figures = {}
        self.samples += self._images
        if self._begun is not None:
            seconds = max(self._clock() - self._begun, 1e-9)
            figures = {
                "speed/step_seconds": seconds, "speed/data_seconds": self._waited, "speed/images_per_second": self._images / seconds,
            }  # fmt: skip
        self._begun, self._waited, self._images = None, 0.0, 0
        return {**figures, "speed/images_seen": float(self.samples)}


def memory_figures(device: torch.device) -> dict[str, float]:
    """Memory in GiB by tracker key: of this process now and at its peak, and of the device where it is a GPU."""
    figures = {}
    if device.type == "cuda":
        figures["memory/device"] = torch.cuda.memory_allocated(device) / GIB
        figures["memory/device_peak"] = torch.cuda.max_memory_allocated(device) / GIB
        figures["memory/device_reserved_peak"] = torch.cuda.max_memory_reserved(device) / GIB
    peak, current = _process_peak(), _process_now()
    figures |= {} if current is None else {"memory/process": current / GIB}
    return figures | ({} if peak is None else {"memory/process_peak": peak / GIB})


def _process_now() -> int | None:
    """Bytes of main memory that this process has now, where the system has a file that says so (Linux)."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        return None
    import resource

    return int(pages.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _process_peak() -> int | None:
    """The most bytes of main memory that this process has had; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
