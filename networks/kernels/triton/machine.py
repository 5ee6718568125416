"""Where the kernels run: which tensors they can read, how they are launched, and how their operators are registered."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
INSTALLED: Final = importlib.util.find_spec("triton") is not None
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels on the CPU then, for tests
OLDEST: Final = (8, 0)  # compute capability: bfloat16 and TF32 products, asynchronous copies
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS: Final = torch.library.Library("hadron", "FRAGMENT")


def can_read(*tensors: Tensor | None) -> bool:
    """Whether kernels run on these tensors: plain floats of at most 32 bits, all on one GPU that is new enough. None is passed over."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if not INSTALLED or device.type != ("cpu" if INTERPRETED else "cuda"):
        return False
    is_readable = all(tensor.dtype in FLOATS and tensor.device == device for tensor in given)
    return is_readable and (INTERPRETED or is_new_enough(device))


def constant_in_graphs(function: Function) -> Function:
    """Marks a function whose result compiled graphs may take as a constant.

    `torch.compiler.assume_constant_result` sets just this, but imports Dynamo, and with it Triton, to do so: more than a second.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@constant_in_graphs
def is_new_enough(device: torch.device) -> bool:
    """Whether a GPU has what the kernels are written for. AMD's have not been tried."""
    return torch.version.hip is None and _capability(device) >= OLDEST


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def launch(kernel: Any, grid: tuple[int, ...], result: Tensor, *args: Any, **constants: Any) -> None:
    """Runs a kernel on the GPU of its result, which is not always the current one."""
    is_elsewhere = result.is_cuda and result.device.index != torch.cuda.current_device()
    with torch.cuda.device(result.device) if is_elsewhere else nullcontext():
        kernel[grid](*args, **constants)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32 for a result of this dtype: TF32 keeps 10 bits, more than either half precision's 7 and 10 round."""
    return "ieee" if dtype == torch.float32 else "tf32"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums for a dtype: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def power_of_2(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count`, and at least `least`: the sides of blocks are such."""
    return max(1 << (count - 1).bit_length(), least)


def check_outside_graphs(*tensors: Tensor | None) -> None:
    """Our promise to call kernels inside autograd functions only: a gradient would be lost without a word."""
    assert not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def register(schema: str, run: Callable[..., object], shape: Callable[..., Tensor | Sequence[Tensor] | None]) -> None:
    """Registers `hadron::` + schema, run by `run`; `shape` makes an empty result. By the plain registry: `custom_op` costs 18 us a call."""
    name = schema.split("(")[0]
    OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    OPERATORS.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hadron::{name}", shape, lib=OPERATORS)
