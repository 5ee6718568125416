"""Blocks that live in the computer's memory and visit the device when they are needed: `--blocks_to_swap`.

A swapped block's weights have one piece of device memory, which is allocated for a visit and freed after it. What autograd keeps of a
weight for the backward pass is a view of that piece, so the next visit fills it too: swapping works with gradient checkpointing and
without. The next block is copied, on a stream of its own, while one computes; at most two visit at a time.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

ALIGNMENT = 256  # bytes: weights start where a copy of their own would


def swap_refusal(device: torch.device) -> str | None:
    """Why swapping blocks makes no sense on this device, or None where it does."""
    return None if device.type == "cuda" else f"the device {device} has no memory of its own to save; it needs a CUDA GPU"


def check_count(count: int, blocks: int) -> None:
    """Raise `ValueError` where a model of so many blocks cannot swap `count` of them."""
    if not 0 <= count <= blocks:
        raise ValueError(f"--blocks_to_swap {count}: the model has {blocks} blocks; give a number from 0 to {blocks}")


class BlockSwap:
    """The last `count` of some blocks that run one after another, kept on the CPU between their visits to `device`.

    Raises `ValueError` for a count that there are not as many blocks as, and for blocks whose weights are trained or packed. The other
    blocks are left alone: see `place`. Hooks of the blocks do the work; `remove` takes them out.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
        check_count(count, len(blocks))
        stream = torch.cuda.Stream(device) if count and device.type == "cuda" else None
        first = len(blocks) - count
        self.device = device
        self.visitors = [Visitor(block, f"block {first + n}", device, stream) for n, block in enumerate(blocks[first:])]
        self._handles: list[RemovableHandle] = []
        self._is_backward = False
        for n, block in enumerate(blocks[first:]):
            self._handles.append(block.register_forward_pre_hook(partial(self._enter, n)))
            self._handles.append(block.register_forward_hook(partial(self._leave, n)))
        if 0 < first < len(blocks):  # so that the first copy has a block's time too
            self._handles.append(blocks[first - 1].register_forward_pre_hook(self._precede))

    def place(self, model: nn.Module) -> None:
        """Move everything of `model` that is not swapped to the device."""
        for visitor in self.visitors:
            visitor.leave()
        swapped = {id(tensor) for visitor in self.visitors for tensor in visitor.tensors}
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in swapped:
                tensor.data = _moved(tensor.data, self.device)

    def remove(self) -> None:
        """Leave all blocks on the CPU, without hooks."""
        for handle in self._handles:
            handle.remove()
        for visitor in self.visitors:
            visitor.leave()

    # Hooks. Checkpointing runs a block's forward again within the backward pass: then the block is here already, and has to stay.

    def _precede(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._is_backward:
            self.visitors[0].fetch()

    def _enter(self, n: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        self._visit(n, then=n - 1 if self._is_backward else n + 1)

    def _leave(self, n: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_backward:
            return
        outputs = output if isinstance(output, tuple) else (output,)
        awaited = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        for tensor in awaited:
            tensor.register_hook(partial(self._backward_enters, n))
        if not awaited or n < len(self.visitors) - 1:  # the last one is the first that the backward pass needs
            self.visitors[n].leave()

    def _backward_enters(self, n: int, gradient: Tensor) -> None:
        if not self._is_backward:
            self._is_backward = True
            Variable._execution_engine.queue_callback(self._backward_ends)
        self._visit(n, then=n - 1)

    def _backward_ends(self) -> None:
        """Send home the block that the backward pass came to last."""
        self._is_backward = False
        for visitor in self.visitors:
            visitor.leave()

    def _visit(self, n: int, then: int) -> None:
        """Let block `n` compute, send all others home, and begin to copy the one that comes `then`."""
        self.visitors[n].fetch()
        self.visitors[n].arrive()
        for other, visitor in enumerate(self.visitors):
            if other not in (n, then):
                visitor.leave()
        if 0 <= then < len(self.visitors):
            self.visitors[then].fetch()


class Visitor:
    """One swapped block: its weights at home, in pinned memory where the device is a GPU, and their place on the device."""

    def __init__(self, block: nn.Module, name: str, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.tensors = list({id(tensor): tensor for tensor in chain(block.parameters(), block.buffers())}.values())
        for tensor in self.tensors:
            if tensor.requires_grad or type(tensor.data) is not Tensor or tensor.is_meta:
                raise ValueError(f"--blocks_to_swap: {name} holds weights that are trained, packed or not loaded; only frozen ones swap")
        self.device, self.stream = device, stream
        self.size = sum(_padded(tensor) for tensor in self.tensors)
        self.at_home = [_at_home(tensor, is_pinned=stream is not None) for tensor in self.tensors]
        self.away = torch.empty(self.size, dtype=torch.uint8, device=device)
        self.at_away = self._views(self.away)
        self._copied: torch.cuda.Event | None = None
        self.is_here = True  # the memory is allocated, and filled or being filled
        self.leave()

    def fetch(self) -> None:
        """Begin to copy the weights to the device, if they are not there."""
        if self.is_here:
            return
        self.is_here = True
        _allocate(self.away, self.size)  # from the computing stream's memory; what had it before may still be read there
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream), torch.no_grad():
            for away, home in zip(self.at_away, self.at_home, strict=True):
                away.copy_(home, non_blocking=True)
        if self.stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(self.stream)

    def arrive(self) -> None:
        """Let the block compute with the fetched weights."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None
        self._show(self.at_away)

    def leave(self) -> None:
        """Free the memory on the device; nothing is copied back, since nothing has changed."""
        if not self.is_here:
            return
        if self._copied is not None:  # fetched in vain: the copy has to end before its memory is another's
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None
        self._show(self.at_home)
        _free(self.away)
        self.is_here = False

    def _show(self, views: Sequence[Tensor]) -> None:
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def _views(self, memory: Tensor) -> list[Tensor]:
        views, start = [], 0
        for tensor in self.tensors:
            end = start + tensor.numel() * tensor.element_size()
            views.append(memory[start:end].view(tensor.dtype).view(tensor.shape))
            start += _padded(tensor)
        return views


def _at_home(tensor: Tensor, *, is_pinned: bool) -> Tensor:
    """A copy on the CPU. One for each weight: torch rounds pinned memory up to powers of two, as most weights are and blocks are not."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned).copy_(tensor.data)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _allocate(memory: Tensor, size: int) -> None:
    memory.untyped_storage().resize_(size)


def _free(memory: Tensor) -> None:
    memory.untyped_storage().resize_(0)
