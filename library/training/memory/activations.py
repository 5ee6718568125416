"""What the blocks of a model keep for the backward pass, found without computing anything.

Under `fakes` (torch's FakeTensorMode) tensors have shapes, dtypes and storages of a size, but no memory and no numbers. A model with
its weights loaded may run under it too: its parameters are taken for their shapes and left alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

WIDE = ("layer_norm", "group_norm", "rms_norm", "softmax", "interpolate", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
"""Functions that a GPU's autocast computes in float32 (torch's ATen/autocast_mode.h), as far as models here use them."""


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """What one block costs in a training step.

    Bytes that autograd keeps of its forward pass, bytes of what it is given (all that remains of it where it is checkpointed), and the
    floating point operations of its forward pass (what checkpointing repeats).
    """

    kept: int
    given: int
    operations: int


@contextmanager
def fakes(*, precision: torch.dtype = torch.float32, as_on_gpu: bool = True) -> Iterator[None]:
    """Let everything within run on fake tensors, with the CPU's operations, under autocast to `precision` where that is a half one.

    With `as_on_gpu`, autocast casts as it does on a GPU, where it keeps norms and softmax in float32 and so keeps more for the backward
    pass. Within other fakes these go on.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    is_half = precision in (torch.bfloat16, torch.float16)
    is_within = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    with (
        nullcontext() if is_within else FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", dtype=precision if is_half else torch.bfloat16, enabled=is_half),
        _wide_functions() if as_on_gpu else nullcontext(),
    ):
        yield


def saved_bytes(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], object]) -> list[BlockBytes]:
    """What each of `blocks` keeps in one forward pass of `model`, which `run` makes with gradients; call it within `fakes`.

    A storage is counted for the block that keeps it first; the model's own parameters and buffers, and what a block was given, are not:
    they are there anyway. A block that is called more than once has the sum.
    """
    meter = _Meter(model, len(blocks))
    handles = [block.register_forward_pre_hook(partial(meter.enter, n), with_kwargs=True) for n, block in enumerate(blocks)]
    handles += [block.register_forward_hook(meter.leave) for block in blocks]
    try:
        with meter.counter, saved_tensors_hooks(meter.keep, lambda tensor: tensor):
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = zip(meter.kept, meter.given, meter.operations, strict=True)
    return [BlockBytes(kept=kept, given=given, operations=operations) for kept, given, operations in found]


class _Meter:
    """Adds up what is kept while one of the blocks runs."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self.kept, self.given, self.operations = [0] * count, [0] * count, [0] * count
        self.counter = _Operations()
        own = list(chain(model.parameters(), model.buffers()))
        self._alive = [*own, *(each.detach() for each in own)]  # with the fakes that stand for them; alive, no identity is given twice
        self._seen = {_identity(each) for each in self._alive}
        self._at: int | None = None
        self._before = 0

    def enter(self, n: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a block begins, and what it is given."""
        self._at, self._before = n, self.counter.total
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.requires_grad and self._is_new(tensor):
                self.given[n] += tensor.untyped_storage().nbytes()

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that a block has ended."""
        assert self._at is not None, "blocks do not run within one another"
        self.operations[self._at] += self.counter.total - self._before
        self._at = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Note that autograd keeps a tensor."""
        if self._at is not None and self._is_new(tensor):
            self.kept[self._at] += tensor.untyped_storage().nbytes()
        return tensor

    def _is_new(self, tensor: Tensor) -> bool:
        identity = _identity(tensor)
        if identity in self._seen:
            return False
        self._seen.add(identity)
        self._alive.append(tensor.detach())
        return True


class _Operations(TorchDispatchMode):
    """Counts the floating point operations of products, convolutions and attention, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def _wide_functions() -> Iterator[None]:
    """Make the casts to float32 that autocast makes on a GPU and not on a CPU.

    The functions themselves are replaced for a while: what torch has for watching functions sleeps in the backward pass, where
    checkpoints call them again.
    """
    own = {name: getattr(functional, name) for name in WIDE}
    for name, function in own.items():
        setattr(functional, name, _wide(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(functional, name, function)


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def widened(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(each) for each in args)
            kwargs = {key: _widened(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    return widened


def _widened(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
