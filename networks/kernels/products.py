"""How a frozen layer's output and an adapter's delta become one: summed before the sum is rounded, once.

In half precision a base output of its own would be rounded first, and swallow a delta below its last bit. So the delta is written first
and the base's product accumulates onto it, in the float32 accumulator that every matrix product has; the bias follows, for it would
swallow the delta too. In float32 the base comes first, with its bias, and the delta accumulates onto it.
No library convolution accumulates onto an addend, so convolutions keep two roundings in half precision.
"""

# An autograd function's `backward` takes as many gradients as it has outputs:
# pyright: reportIncompatibleMethodOverride=false

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.kernels.triton.machine import constant_in_graphs
from networks.layers import LayerShape

Write = Callable[[Tensor, float], Any]
"""`write(y, beta)`: y (M, out) becomes beta * y + delta, in place; beta is 1, or 0 where y holds nothing yet."""


class Base(NamedTuple):
    """The frozen product of a layer that a delta is added to: `weight` (out, inner, *kernel), `bias` (out,) or None.

    `multiplier` is the strength of the delta. Both tensors in any float dtype: they are cast to the input's.
    """

    weight: Tensor
    bias: Tensor | None
    multiplier: float = 1.0


NO_BASE = (None, None, 1.0)  # a delta alone
KEPT_SHARE = 0.1  # what may be kept beside the input, as a share of it; more is computed again. Compilers decide by themselves


def working_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which products of `dtype` are computed: float32 for half precision on a CPU without instructions for it."""
    return torch.float32 if device_type == "cpu" and dtype.itemsize == 2 and _is_emulated(dtype) else dtype


@functools.cache
@constant_in_graphs  # within: a compiler looks through the cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU computes half precision by conversions, element by element: many times slower than float32."""
    mkldnn = torch.ops.mkldnn
    is_supported = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return not is_supported()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of `x` now, if it does."""
    device_type = x.device.type
    is_cast = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_cast else None


def without_autocast(x: Tensor, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given.

    Entering and leaving one costs as much as several small kernels, so there is none where all products are of autocast's own `dtype`.
    """
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) == dtype:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors in `dtype`; asking for a dtype that is there already costs as much as a small kernel, so it is not asked for."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def cast_once(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """Factors in the dtype of `x`, as a step of the graph: so the backward pass finds them cast, at the price of keeping the copies.

    As they are where products are computed in another dtype, or where the copies are more than a small share of the input.
    """
    is_cast = all(factor.dtype == x.dtype for factor in factors) or working_dtype(x.dtype, x.device.type) != x.dtype
    if is_cast or torch.compiler.is_compiling():  # compilers decide by themselves, and without a guard on the number of tokens
        return factors
    return factors if sum(factor.numel() for factor in factors) > KEPT_SHARE * x.numel() else tuple(cast(x.dtype, *factors))


def as_rows(x: Tensor) -> Tensor:
    """Features (..., n) as rows (M, n)."""
    return x.reshape(-1, x.shape[-1])


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (M, n) with the leading dimensions of `x`.

    For what an autograd function returns: a view in there is no node of the graph, but as a known view nobody could change it in place.
    """
    y = rows.view(*x.shape[:-1], rows.shape[-1])
    return y if torch._C._are_functorch_transforms_active() else y.detach()


def as_output(y: Tensor, dtype: torch.dtype) -> Tensor:
    """What an autograd function made, in the dtype that it returns.

    Under torch 2.11's compiler no gradient reaches a function whose output is what an in-place operation or an idle cast gave back
    (found by trying; 2.13's is right): there it becomes a tensor of its own.
    """
    y = y if y.dtype == dtype else y.to(dtype)
    return y.detach() if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() else y


def like(factors: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Gradients in the shapes and dtypes of the stored factors."""
    return [
        gradient if gradient.shape == factor.shape and gradient.dtype == factor.dtype else gradient.reshape(factor.shape).to(factor.dtype)
        for gradient, factor in zip(gradients, factors, strict=True)
    ]


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """A function of this package; by its forward's own operations where no gradient is asked for, or one of functorch's kind."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function.forward(NoContext, *arguments)
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    past_checks: Any = super(torch.autograd.Function, function)  # for functorch, which take a tenth of a small layer's time
    return past_checks.apply(*arguments)


def is_differentiated() -> bool:
    """Whether the backward pass that runs now is to be differentiated: what forward kept beside its inputs has no graph for that."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class NoContext:
    """What `forward` writes to where there is no backward pass; it keeps nothing."""

    @staticmethod
    def save_for_backward(*tensors: Tensor | None) -> None:
        """Forget them."""


def joined_product(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: int, write: Write) -> Tensor:
    """x (M, in) through weight and bias, plus what `write` adds: (M, out), rounded once. Without a weight the delta alone."""
    if weight is None:
        y = x.new_empty(x.shape[0], out)
        write(y, 0.0)
        return y
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if x.itemsize >= 4:
        y = F.linear(x, weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
        write(y, 1.0)
        return y
    y = x.new_empty(x.shape[0], out)
    write(y, 0.0)
    y.addmm_(x, weight.t())
    return y if bias is None else y.add_(bias if bias.itemsize > 1 else bias.to(y.dtype))  # torch adds no float8


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, in one kernel."""
    if scale == 1:
        return torch.mm(left, right)
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def base_input_gradient(grad: Tensor, weight: Tensor | None, inner: int) -> tuple[Tensor, float]:
    """The base's part of an input gradient (M, in) for `grad` (M, out), and the `beta` with which the delta's is accumulated onto it."""
    if weight is None:
        return grad.new_empty(grad.shape[0], inner), 0.0
    return torch.mm(grad, weight if weight.dtype == grad.dtype else weight.to(grad.dtype)), 1.0


def convolved(x: Tensor, shape: LayerShape, apply: Callable[[Tensor, LayerShape], Any]) -> Tensor:
    """`apply` on an input that has a batch, and on a shape whose padding is by numbers, as convolutions' gradients need it."""
    if not shape.batch_of(x):
        return convolved(x.unsqueeze(0), shape, apply).squeeze(0)
    return apply(*shape.padded(x))


def add_base(x: Tensor, base: Base, delta: Tensor, shape: LayerShape) -> Tensor:
    """A delta of any origin and float dtype on the base's output for `x`, in the dtype of `x`; its strength is applied here."""
    delta = delta if base.multiplier == 1 else delta * base.multiplier
    if shape.kernel and not shape.batch_of(x):
        return add_base(x.unsqueeze(0), Base(base.weight, base.bias), delta.unsqueeze(0), shape).squeeze(0)
    x, shape = shape.padded(x)
    return run(_Sum, x, delta, base.weight, base.bias, shape)


class _Sum(torch.autograd.Function):
    """A delta plus the base's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, shape: LayerShape) -> Tensor:
        ctx.save_for_backward(x if shape.kernel else None, weight)  # a convolution's gradient asks for its input, if only for the sizes
        ctx.shape, ctx.delta_dtype = shape, delta.dtype
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            if shape.kernel:
                y = shape.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)) + delta
                return as_output(y, x.dtype)
            rows = delta.reshape(-1, delta.shape[-1]).to(dtype)
            y = joined_product(
                x.reshape(-1, x.shape[-1]).to(dtype), weight, bias, delta.shape[-1], lambda y, beta: y.add_(rows) if beta else y.copy_(rows)
            )
        return as_output(y, x.dtype).view(delta.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            dtype = working_dtype(grad.dtype, grad.device.type)
            with without_autocast(grad):
                wide, weight = grad.to(dtype), weight.to(dtype)
                found = wide @ weight if x is None else ctx.shape.gradients(wide, x.to(dtype), weight, needs_weight=False)[0]
            grad_x = found.to(grad.dtype)
        return grad_x, grad.to(ctx.delta_dtype), None, None, None
