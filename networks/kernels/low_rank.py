"""y = W x + b + s * up(down(x)): LoRA, and LoHa as the exact LoRA of rank r*r that it is.

LoHa: (a1 b1) * (a2 b2) = up @ down with up[:, pq] = a1[:, p] a2[:, q] and down[pq] = b1[p] b2[q], the row-wise Khatri-Rao products
(`khatri_rao`). They are built anew in the backward pass; x and the factors are all that is kept.

    hidden = down(x);  grad_hidden = s * up^T grad;  grad_x = W^T grad + down^T grad_hidden
    grad_up = s * grad hidden^T;  grad_down = grad_hidden x^T
"""

# An autograd function's `backward` takes as many gradients as it has outputs:
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.kernels.products import (
    KEPT_SHARE,
    NO_BASE,
    Base,
    as_output,
    as_rows,
    base_input_gradient,
    cast,
    cast_once,
    convolved,
    from_rows,
    is_differentiated,
    joined_product,
    like,
    run,
    scaled_product,
    without_autocast,
    working_dtype,
)
from networks.kernels.triton.linear import extended_linear, extended_linear_input_gradient
from networks.layers import LayerShape


def low_rank(
    x: Tensor, factors: tuple[Tensor, ...], scale: float, shape: LayerShape, base: Base | None = None, *, is_fused: bool = False
) -> Tensor:
    """The scaled delta of `x` (..., in) or (batch, in, *positions), with `base` the layer's whole output, in the dtype of `x`.

    `factors` are down (r, inner, *kernel) and up (out, r), or LoHa's a1 (out, r), b1 (r, inner * kernel), a2, b2, in any float dtype;
    gradients come back in theirs. `is_fused` makes base and delta of a Linear one Triton kernel where there can be one.
    """
    weight, bias, strength = base or NO_BASE
    scale = scale * strength
    if shape.kernel:
        return convolved(x, shape, lambda x, shape: run(_Convolved, x, weight, bias, scale, shape, *factors))
    if len(factors) == 2:
        factors = cast_once(x, *factors)
    return run(_Linear, x, weight, bias, scale, is_fused, *factors)


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(a1 b1) * (a2 b2) as one product up @ down of rank r1*r2: (out, r1*r2) and (r1*r2, ...), b being (r, ...).

    up[:, pq] = a1[:, p] a2[:, q] and down[pq] = b1[p] b2[q], the row-wise Khatri-Rao products. Exact.
    """
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    return up, (b1.unsqueeze(1) * b2).flatten(0, 1)


class _Linear(torch.autograd.Function):
    """Of features x (..., in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, is_fused: bool, *factors: Tensor) -> Tensor:
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x, dtype):
            rows, down, up = cast(dtype, as_rows(x), *_matrices(factors))
            hidden = F.linear(rows, down)
            if is_fused and weight is not None:
                y = extended_linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype), hidden, up, scale)
            else:
                y = joined_product(rows, weight, bias, up.shape[0], lambda y, beta: y.addmm_(hidden, up.t(), beta=beta, alpha=scale))
        is_small = not torch.compiler.is_compiling() and hidden.shape[1] <= KEPT_SHARE * rows.shape[1]
        ctx.save_for_backward(x, weight, hidden if is_small else None, *factors)
        ctx.scale, ctx.is_fused = scale, is_fused
        return from_rows(y if dtype == x.dtype else y.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, hidden, *factors = ctx.saved_tensors
        dtype, grad_x = working_dtype(grad.dtype, grad.device.type), None
        with without_autocast(grad):
            rows, grad, down, up = cast(dtype, as_rows(x), as_rows(grad), *_matrices(factors))
            if hidden is None or is_differentiated():
                hidden = F.linear(rows, down)
            grad_hidden = scaled_product(grad, up, ctx.scale)
            if ctx.needs_input_grad[0] and ctx.is_fused and weight is not None:
                grad_x = extended_linear_input_gradient(grad, weight.to(dtype), grad_hidden, down)
            elif ctx.needs_input_grad[0]:
                grad_x, beta = base_input_gradient(grad, weight, rows.shape[1])
                grad_x.addmm_(grad_hidden, down, beta=beta)
            grad_up = scaled_product(grad.t(), hidden, ctx.scale)
            gradients = _factor_gradients(factors, torch.mm(grad_hidden.t(), rows), grad_up)
            grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, None, None, None, *gradients


class _Convolved(torch.autograd.Function):
    """Of images x (batch, in, *positions): `down` slides as the layer does, `up` mixes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, shape: LayerShape, *factors: Tensor
    ) -> Tensor:
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            images, down, up = cast(dtype, x, *_matrices(factors))
            hidden = shape.apply(images, down.view(-1, shape.inner, *shape.kernel))
            y = shape.mix(hidden, up)
            if weight is None:
                y *= scale
            else:
                y = shape.apply(images, weight.to(dtype), None if bias is None else bias.to(dtype)).add_(y, alpha=scale)
        is_small = not torch.compiler.is_compiling() and hidden.numel() <= KEPT_SHARE * x.numel()
        ctx.save_for_backward(x, weight, hidden if is_small else None, *factors)
        ctx.scale, ctx.shape = scale, shape
        return as_output(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, hidden, *factors = ctx.saved_tensors
        shape, needs_x = ctx.shape, ctx.needs_input_grad[0]
        dtype = working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            images, grad, down, up = cast(dtype, x, grad, *_matrices(factors))
            down = down.view(-1, shape.inner, *shape.kernel)
            hidden = shape.apply(images, down) if hidden is None or is_differentiated() else hidden
            grad_hidden, grad_up = shape.mix_gradients(grad, hidden, up * ctx.scale)
            grad_x, grad_down = shape.gradients(grad_hidden, images, down, needs_x=needs_x)
            if grad_x is not None and weight is not None:
                grad_x += shape.gradients(grad, images, weight.to(dtype), needs_weight=False)[0]
            gradients = _factor_gradients(factors, grad_down.flatten(1), grad_up * ctx.scale)
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, *gradients


def _matrices(factors: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, Tensor]:
    """`down` and `up` as matrices, in the factors' dtype: rounded once where they are products."""
    if len(factors) == 2:
        down, up = factors
        return (down, up) if down.dim() == 2 == up.dim() else (down.flatten(1), up.flatten(1))
    up, down = khatri_rao(*factors)
    return down, up


def _factor_gradients(factors: list[Tensor], grad_down: Tensor, grad_up: Tensor) -> list[Tensor]:
    """Gradients of the stored factors, in their dtypes, from those of the matrices down and up."""
    if len(factors) == 2:
        gradients = [grad_down, grad_up]
    else:
        a1, b1, a2, b2 = factors
        columns = grad_up.to(a1.dtype).view(-1, a1.shape[1], a2.shape[1])  # (out, p, q)
        rows = grad_down.to(b1.dtype).view(b1.shape[0], b2.shape[0], -1)  # (p, q, fan-in)
        gradients = [
            torch.bmm(columns, a2.unsqueeze(2)).squeeze(2), (rows * b2).sum(1),
            torch.bmm(a1.unsqueeze(1), columns).squeeze(1), (rows * b1.unsqueeze(1)).sum(0),
        ]  # fmt: skip
    return like(factors, gradients)
