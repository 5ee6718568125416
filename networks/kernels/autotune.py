"""Measuring the ways to a delta instead of modelling them: once for a kind of layer, number of tokens and device, and kept in a file.

For `--network_args autotune=True`. Each way, and on a GPU each of its Triton kernels, runs forward and backward on the input at hand;
the median decides. Numbers of tokens are rounded up to powers of two. A compiler cannot measure: what it compiles takes the model's way.
Ways differ in their last bits, so a run that shall repeat another bit for bit needs the file of that one, or no autotuning.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.core.atomic import write_text
from library.core.log import get_logger
from networks.kernels.triton.machine import INSTALLED, is_new_enough

logger = get_logger(__name__)

TURNS, WARM_UP = 5, 2


def default_file() -> Path:
    """Where measured ways are kept: `hadron/ways.json` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hadron" / "ways.json"


class Tuner:
    """The fastest way by what was measured, here or in an earlier run with the same file."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or default_file()
        self._known: dict[str, dict[str, float]] | None = None
        self._keeps = True

    def way(self, key: str, ways: list[str], run: Callable[[str], Callable[[], Any]], device: torch.device) -> str:
        """The fastest of `ways` for what `key` describes; `run(way)` is one forward and backward of it, measured if none was yet."""
        if self._known is None:
            self._known = _read(self.file)
        found = self._known.get(key, {})
        lacking = [way for way in ways if way not in found]
        if lacking:
            found = found | {way: _median_time(run(way), device) for way in lacking}
            self._known[key] = found
            self._keep()
        return min(ways, key=found.__getitem__)

    def _keep(self) -> None:
        """Write what is known, beside what other processes have written since; a warning, once, where that cannot be."""
        if not self._keeps:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(_read(self.file) | (self._known or {}), indent=1, sort_keys=True) + "\n")
        except OSError as error:
            self._keeps = False
            logger.warning("%s cannot be written (%s); what is measured holds for this run only", self.file, error)


def key_of(kind: str, x: Tensor, tokens: int, joins: bool) -> str:
    """What a measurement holds for: a kind of layer, tokens, dtype, whether the base's product is joined, device and versions."""
    device = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else f"{x.device.type}, {torch.get_num_threads()} threads"
    return f"{kind}; {bucket_of(tokens)} tokens; {x.dtype}; {'with' if joins else 'without'} base; {device}; torch {torch.__version__}"


def bucket_of(tokens: int) -> int:
    """A number of tokens rounded up to a power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels can run there."""
    return INSTALLED and device.type == "cuda" and is_new_enough(device)


def _read(file: Path) -> dict[str, dict[str, float]]:
    """What a file holds; nothing, and a warning, where it is damaged."""
    try:
        if not file.is_file():
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): {str(way): float(seconds) for way, seconds in times.items()} for key, times in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s is not a file of measured ways (%s); it is written anew", file, error)
        return {}


def _median_time(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a step."""
    times = []
    for turn in range(TURNS + WARM_UP):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        if turn >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
