"""y = W x + b + s * up(down(x)): LoRA, and LoHa as the exact LoRA of rank r*r that it is.

LoHa: (a1 b1) * (a2 b2) = up @ down with up[:, pq] = a1[:, p] a2[:, q] and down[pq] = b1[p] b2[q], the row-wise Khatri-Rao products
(`khatri_rao`). They are built anew in the backward pass; x and the factors are all that is kept.

    hidden = down(x);  grad_hidden = s * up^T grad;  grad_x = W^T grad + down^T grad_hidden
    grad_up = s * grad hidden^T;  grad_down = grad_hidden x^T
"""

from typing import Any

import torch
from torch import Tensor

from networks.kernels.products import Base, cast, convolved, input_gradient, joined_product, without_autocast, working_dtype
from networks.layers import LayerShape

KEPT_SHARE = 0.1  # what may be kept beside the input, as a share of it; more is computed again


def low_rank(x: Tensor, factors: tuple[Tensor, ...], scale: float, shape: LayerShape, base: Base | None = None) -> Tensor:
    """The scaled delta of `x` (..., in) or (batch, in, *positions), with `base` the layer's whole output, in the dtype of `x`.

    `factors` are down (r, inner, *kernel) and up (out, r), or LoHa's a1 (out, r), b1 (r, inner * kernel), a2, b2, in any float dtype;
    gradients come back in theirs.
    """
    weight, bias, strength = base or (None, None, 1.0)
    scale = scale * strength
    if shape.kernel:
        return convolved(x, shape, lambda x, shape: _Convolved.apply(x, weight, bias, scale, shape, *factors))
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, scale, *factors)
    return y.view(*x.shape[:-1], shape.out)  # pyright: ignore[reportOptionalMemberAccess]


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(a1 b1) * (a2 b2) as one product up @ down of rank r1*r2: (out, r1*r2) and (r1*r2, ...), b being (r, ...).

    up[:, pq] = a1[:, p] a2[:, q] and down[pq] = b1[p] b2[q], the row-wise Khatri-Rao products. Exact.
    """
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    return up, (b1.unsqueeze(1) * b2).flatten(0, 1)


class _Linear(torch.autograd.Function):
    """Of rows x (M, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, *factors: Tensor) -> Tensor:
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            rows = x.to(dtype)
            down, up = _pair(factors, dtype)
            hidden = rows @ down.t()
            y = joined_product(rows, weight, bias, up.shape[0], lambda y, beta: y.addmm_(hidden, up.t(), beta=beta, alpha=scale))
        is_small = hidden.shape[1] <= KEPT_SHARE * x.shape[1]
        ctx.save_for_backward(x, weight, hidden.to(x.dtype) if is_small else None, *factors)
        ctx.scale = scale
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, hidden, *factors = ctx.saved_tensors
        dtype = working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            rows, grad = x.to(dtype), grad.to(dtype)
            down, up = _pair(factors, dtype)
            hidden = rows @ down.t() if hidden is None else hidden.to(dtype)
            grad_hidden = grad.new_empty(hidden.shape).addmm_(grad, up, beta=0, alpha=ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                total, beta = input_gradient(grad, weight, x.shape[1])
                grad_x = total.addmm_(grad_hidden, down, beta=beta).to(x.dtype)
            grad_up = grad.new_empty(up.shape).addmm_(grad.t(), hidden, beta=0, alpha=ctx.scale)
            gradients = _factor_gradients(factors, grad_hidden.t() @ rows, grad_up)
        return grad_x, None, None, None, *gradients


class _Convolved(torch.autograd.Function):
    """Of images x (batch, in, *positions): `down` slides as the layer does, `up` mixes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, shape: LayerShape, *factors: Tensor
    ) -> Tensor:
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            images = x.to(dtype)
            down, up = _pair(factors, dtype)
            hidden = shape.apply(images, down.view(-1, shape.inner, *shape.kernel))
            y = shape.mix(hidden, up * scale)
            if weight is not None:
                y += shape.apply(images, weight.to(dtype), None if bias is None else bias.to(dtype))
        is_small = hidden.numel() <= KEPT_SHARE * x.numel()
        ctx.save_for_backward(x, weight, hidden.to(x.dtype) if is_small else None, *factors)
        ctx.scale, ctx.shape = scale, shape
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, hidden, *factors = ctx.saved_tensors
        shape, needs_x = ctx.shape, ctx.needs_input_grad[0]
        dtype = working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            images, grad = x.to(dtype), grad.to(dtype)
            down, up = _pair(factors, dtype)
            down = down.view(-1, shape.inner, *shape.kernel)
            hidden = shape.apply(images, down) if hidden is None else hidden.to(dtype)
            grad_hidden, grad_up = shape.mix_gradients(grad, hidden, up * ctx.scale)
            grad_x, grad_down = shape.gradients(grad_hidden, images, down, needs_x=needs_x)
            if grad_x is not None and weight is not None:
                grad_x += shape.gradients(grad, images, weight.to(dtype), needs_weight=False)[0]
            gradients = _factor_gradients(factors, grad_down.flatten(1), grad_up * ctx.scale)
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, *gradients


def _pair(factors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`down` and `up` as matrices in `dtype`."""
    if len(factors) == 2:
        down, up = cast(dtype, *factors)
        return down.flatten(1), up.flatten(1)
    up, down = khatri_rao(*cast(dtype, *factors))
    return down, up


def _factor_gradients(factors: list[Tensor], grad_down: Tensor, grad_up: Tensor) -> list[Tensor]:
    """Gradients of the stored factors, in their dtypes, from those of the matrices down and up."""
    if len(factors) == 2:
        gradients = [grad_down, grad_up]
    else:
        a1, b1, a2, b2 = cast(grad_up.dtype, *factors)
        columns = grad_up.view(-1, a1.shape[1], a2.shape[1])  # (out, p, q)
        rows = grad_down.view(b1.shape[0], b2.shape[0], -1)  # (p, q, fan-in)
        gradients = [
            torch.einsum("opq,oq->op", columns, a2), (rows * b2).sum(1),
            torch.einsum("opq,op->oq", columns, a1), (rows * b1.unsqueeze(1)).sum(0),
        ]  # fmt: skip
    return [gradient.reshape(factor.shape).to(factor.dtype) for gradient, factor in zip(gradients, factors, strict=True)]
