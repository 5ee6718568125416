"""What a run costs: its time, the bytes kept for backward, the most bytes alive at once, the kernels, and the exchanges with the host.

On a CPU everything but time is read from the operations that torch dispatches, so it is the same on every machine.
"""

import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class _Ledger(TorchDispatchMode):
    """Counts kernels, host exchanges and the bytes of living tensors that came to be under it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.host_exchanges = self.peak = self._bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [storage for storage in _storages(result) if storage._cdata not in given]
        for storage in made:
            if storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        self._count(func, args, launches=bool(made) or func._schema.is_mutable)
        return result

    def _forget(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self._bytes -= size

    def _count(self, func: Any, args: Any, launches: bool) -> None:
        name = func._schema.name.partition("::")[2]
        self.host_exchanges += name in HOST_EXCHANGES
        if launches and not name.startswith(ALLOCATIONS):
            self.kernels += sum(args[-1]) if name == "convolution_backward" else 1  # its mask says which gradients are wanted


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


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
