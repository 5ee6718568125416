"""What a run costs: its time, the bytes kept for backward, the most bytes alive at once, the kernels, and the exchanges with the host.

On a CPU everything but time is read from the operations that torch dispatches, so it is the same on every machine.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from library.training.forecast.ledger import Ledger

LEAST_TIME = 0.02  # seconds of one timing: shorter runs are repeated within it
ALLOCATIONS = ("empty", "new_empty", "lift_fresh", "_unsafe_view")  # beginnings of operations that launch nothing
HOST_EXCHANGES = ("_local_scalar_dense", "lift_fresh")  # a value read by the host; a tensor made from the host's numbers


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one forward and backward did.

    The bytes kept for backward, the most bytes of tensors alive at once beyond those before it, kernels, and exchanges with the host.
    """

    kept_bytes: int
    peak_bytes: int
    kernels: int
    host_exchanges: int


def seconds_of(run: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of one run, the mean of `repeats`.

    On a CPU those that this thread computed, which other work on the machine does not lengthen; on a GPU wall time to its end.
    """
    clock = time.thread_time if device == "cpu" else time.perf_counter
    _wait(device)
    started = clock()
    for _ in range(repeats):
        run()
    _wait(device)
    return (clock() - started) / repeats


def repeats_for(run: Callable[[], object], device: str = "cpu") -> int:
    """How often to repeat a run so that its timing is long enough for the clock."""
    return max(1, round(LEAST_TIME / max(seconds_of(run, device), 1e-6)))


def traced(forward: Callable[[], Tensor], gradient: Tensor | None = None, owned: Iterable[Tensor] = (), device: str = "cpu") -> Trace:
    """What `forward` and the backward from its output do: by torch's operations on a CPU, by its profiler and allocator on a GPU.

    `gradient` is the output's, not needed for a single number. `owned` are the parameters: what is kept of them costs nothing. What
    forward leaves behind of an earlier call it must drop itself; on a GPU it is called several times.
    """
    known = {tensor.untyped_storage()._cdata for tensor in owned}
    return _traced_operations(forward, gradient, known) if device == "cpu" else _traced_on_gpu(forward, gradient, known)


def _traced_operations(forward: Callable[[], Tensor], gradient: Tensor | None, known: set[int]) -> Trace:
    ledger, kept = _Ledger(), _Kept(known)
    with ledger:
        with kept.hooks():
            output = forward()
        output.backward(gradient)
    return Trace(kept_bytes=kept.bytes, peak_bytes=ledger.peak, kernels=ledger.kernels, host_exchanges=ledger.host_exchanges)


def allocator_peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once during a run, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(cast(Any, event).nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


class _Kept:
    """Adds up the distinct storages that are kept for backward, but for the known ones."""

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._found: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._found.values())

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._found[storage._cdata] = storage.nbytes()
        return tensor


class _Ledger(Ledger):
    """Counts kernels and host exchanges besides the bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.host_exchanges = 0

    def note(self, func: Any, args: Any, launches: bool) -> None:
        name = func._schema.name.partition("::")[2]
        self.host_exchanges += name in HOST_EXCHANGES
        if launches and not name.startswith(ALLOCATIONS):
            self.kernels += sum(args[-1]) if name == "convolution_backward" else 1  # its mask says which gradients are wanted


def _traced_on_gpu(forward: Callable[[], Tensor], gradient: Tensor | None, known: set[int]) -> Trace:
    def run() -> None:
        forward().backward(gradient)

    kept = _Kept(known)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with kept.hooks():
        output = forward()
    output.backward(gradient)
    del output
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return Trace(kept_bytes=kept.bytes, peak_bytes=peak, kernels=len(on_device), host_exchanges=_synchronisations(run))


def _synchronisations(run: Callable[[], object]) -> int:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
