"""What checkpoints keep, waiting in main memory until the backward pass needs it: `--cpu_offload_checkpointing`.

A checkpointed block keeps what it was given and computes the rest again. The largest of that, its first argument, goes to main memory
here while the block computes. The backward pass asks for it in the opposite order: when one is needed, the one before it sets out too.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Offload:
    """Calls functions under a checkpoint whose first argument waits in main memory.

    On a CUDA device it is copied into pinned memory and back by a stream of its own, beside the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._latest: ReferenceType[Parked] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` gives; its activations are computed again in the backward pass."""
        place, shape = args[0].data_ptr(), args[0].shape  # not the tensor itself: autograd keeps `pack`

        def pack(tensor: Tensor) -> "Tensor | Parked":
            return self._park(tensor) if tensor.data_ptr() == place and tensor.shape == shape else tensor

        with saved_tensors_hooks(pack, _unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _park(self, tensor: Tensor) -> "Parked":
        parked = Parked(tensor, self.stream, self._latest)
        self._latest = ref(parked)
        return parked


class Parked:
    """A tensor in main memory, which autograd keeps in place of the one on the device."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None, before: "ReferenceType[Parked] | None") -> None:
        self.device, self.stream, self.before = tensor.device, stream, before
        self.home = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None, requires_grad=False)
        self._back: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._copy(tensor, self.home)
        if stream is not None:
            tensor.record_stream(stream)  # its memory is another's only once the copy has ended

    def fetch(self) -> None:
        """Begin to copy it back, if that has not begun."""
        if self._back is None:
            self._back = torch.empty_like(self.home, device=self.device)
            self._copy(self.home, self._back)
            if self.stream is not None:
                self._copied = torch.cuda.Event()
                self._copied.record(self.stream)

    def take(self) -> Tensor:
        """The tensor on the device, for the computation that comes next; the one parked before it sets out."""
        self.fetch()
        assert self._back is not None
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        back, self._back, self._copied = self._back, None, None
        return back

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream), torch.no_grad():
            target.copy_(source, non_blocking=True)


def _unpack(kept: "Tensor | Parked") -> Tensor:
    return kept.take() if isinstance(kept, Parked) else kept
