"""y = W x + b + s * (w1 kron w2) x without the Kronecker product: LoKr.

The input is seen as blocks X (B, D) and the output as Y (A, C): Y = s * w1 X w2^T, and for convolutions w2 slides over the B images.
Three orders, all exact, of which `cost.py` takes the cheapest:

    rank space (w2 = w2_a w2_b):  Y = s * (w1 (X w2_b^T)) w2_a^T        the cost of a LoRA of rank r, and r * A * B
    w2 first:                     Y = s * w1 (X w2^T)
    w1 first:                     Y = s * (w1 X) w2^T

Backward by the same identities: with J = grad w2 (A, D), grad_X = s * w1^T J and grad_w1 = s * J X^T; grad_w2 = s * grad^T (w1 X), or
with the blocks of grad mixed instead, s * (w1^T grad)^T X. Nothing of the weight's size is made; x and the factors are all that is kept.
"""

# An autograd function's `backward` takes as many gradients as it has outputs:
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
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
from networks.kernels.triton.mixing import kronecker_mix
from networks.layers import LayerShape


def kronecker_product(
    x: Tensor,
    w1: Tensor,
    w2: tuple[Tensor, ...],
    scale: float,
    shape: LayerShape,
    base: Base | None = None,
    *,
    mixes_first: bool = False,
    is_fused: bool = False,
) -> Tensor:
    """The scaled delta of `x` (..., B * D) or (batch, B * D, *positions), with `base` the layer's whole output, in the dtype of `x`.

    `w1` (A, B); `w2` is one tensor (C, D, *kernel), or w2_a (C, r) and w2_b (r, D * kernel), or for convolutions w2_a (C, r), w2_b (r, D)
    and a core (r, r, *kernel), in any float dtype; gradients come back in theirs. `mixes_first` applies w1 to the input's blocks
    instead of the output's; in rank space it has no meaning. `is_fused` mixes the blocks of a Linear by a Triton kernel where there can
    be one.
    """
    weight, bias, strength = base or NO_BASE
    scale = scale * strength
    if not shape.kernel:
        function: Any = _RankedLinear if len(w2) == 2 else _WholeLinear
        return run(function, x, weight, bias, scale, mixes_first, is_fused, *cast_once(x, w1, *w2))
    function = _WholeConvolution if len(w2) == 1 else _RankedConvolution
    return convolved(x, shape, lambda x, shape: run(function, x, weight, bias, scale, mixes_first, shape, w1, *w2))


class _RankedLinear(torch.autograd.Function):
    """Features x (..., B * D), through the rank of w2."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, _: bool, is_fused: bool, w1: Tensor,
        left: Tensor, right: Tensor,
    ) -> Tensor:  # fmt: skip
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x, dtype):
            rows, mixer, up, down = cast(dtype, as_rows(x).contiguous(), w1, left, right)
            hidden = _through(_blocks(rows, w1.shape[1]), down.t())  # (M, B, r)
            mixed = _mix(mixer, hidden, is_fused).view(-1, down.shape[0])  # (M * A, r)

            def write(y: Tensor, beta: float) -> None:
                y.view(-1, up.shape[0]).addmm_(mixed, up.t(), beta=beta, alpha=scale)

            y = joined_product(rows, weight, bias, w1.shape[0] * left.shape[0], write)
        is_small = not torch.compiler.is_compiling() and hidden.shape[1] * hidden.shape[2] <= KEPT_SHARE * rows.shape[1]
        ctx.save_for_backward(x, weight, hidden if is_small else None, w1, left, right)
        ctx.scale, ctx.is_fused = scale, is_fused
        return from_rows(y if dtype == x.dtype else y.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, hidden, *factors = ctx.saved_tensors
        dtype = working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            rows, grad, mixer, up, down = cast(dtype, as_rows(x).contiguous(), as_rows(grad).contiguous(), *factors)
            (a, b), r = mixer.shape, down.shape[0]
            if hidden is None or is_differentiated():
                hidden = _through(_blocks(rows, b), down.t())  # (M, B, r)
            out_blocks = grad.view(-1, up.shape[0])  # (M * A, C)
            grad_mixed = scaled_product(out_blocks, up, ctx.scale)
            mixed = _mix(mixer, hidden, ctx.is_fused).view(-1, r)
            grad_up = scaled_product(out_blocks.t(), mixed, ctx.scale)
            grad_hidden = _mix(mixer.t(), grad_mixed.view(-1, a, r), ctx.is_fused).view(-1, r)  # (M * B, r)
            grad_mixer = _sum_of_products(grad_mixed.view(-1, a, r), hidden)
            in_blocks = rows.view(-1, down.shape[1])  # (M * B, D)
            grad_down = grad_hidden.t() @ in_blocks
            grad_x = None
            if ctx.needs_input_grad[0]:
                total, beta = base_input_gradient(grad, weight, rows.shape[1])
                total.view(in_blocks.shape).addmm_(grad_hidden, down, beta=beta)
                grad_x = total.view(x.shape).to(x.dtype)
        return grad_x, None, None, None, None, None, *like(factors, [grad_mixer, grad_up, grad_down])


class _WholeLinear(torch.autograd.Function):
    """Features x (..., B * D), with w2 whole."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, mixes_first: bool, is_fused: bool, w1: Tensor,
        w2: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, w1, w2)
        ctx.scale, ctx.is_fused = scale, is_fused
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x, dtype):
            rows, mixer, matrix = cast(dtype, as_rows(x).contiguous(), w1, w2)
            (a, b), (c, d) = mixer.shape, matrix.shape
            if mixes_first:
                blocks = _mix(mixer, _blocks(rows, b), is_fused).view(-1, d)  # (M * A, D)

                def write(y: Tensor, beta: float) -> None:
                    y.view(-1, c).addmm_(blocks, matrix.t(), beta=beta, alpha=scale)
            else:
                blocks = _through(_blocks(rows, b), matrix.t())  # (M, B, C)

                def write(y: Tensor, beta: float) -> None:
                    _mix_onto(y.view(-1, a, c), mixer, blocks, beta, scale, is_fused)

            y = joined_product(rows, weight, bias, a * c, write)
        return from_rows(y if dtype == x.dtype else y.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        dtype = working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            rows, grad, mixer, matrix = cast(dtype, as_rows(x).contiguous(), as_rows(grad).contiguous(), *factors)
            (a, b), (c, d) = mixer.shape, matrix.shape
            out_blocks, in_blocks = grad.view(-1, a, c), rows.view(-1, b, d)
            through = _through(out_blocks, matrix)  # (M, A, D)
            grad_mixer = _sum_of_products(through, in_blocks).mul_(ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                total, beta = base_input_gradient(grad, weight, rows.shape[1])
                _mix_onto(total.view(in_blocks.shape), mixer.t(), through, beta, ctx.scale, ctx.is_fused)
                grad_x = total.view(x.shape).to(x.dtype)
            if a * d <= b * c:  # mix the narrower side
                left, right = out_blocks, _mix(mixer, in_blocks, ctx.is_fused)
            else:
                left, right = _mix(mixer.t(), out_blocks, ctx.is_fused), in_blocks
            grad_matrix = scaled_product(left.reshape(-1, c).t(), right.reshape(-1, d), ctx.scale)
        return grad_x, None, None, None, None, None, *like(factors, [grad_mixer, grad_matrix])


class _RankedConvolution(torch.autograd.Function):
    """Images x (N, B * D, *positions): w2_b slides over N * B images, or mixes them for a core that slides; w1 and w2_a mix its ranks.

    With groups there are B blocks in each, which the rows of w1 that belong to the group mix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, _: bool, shape: LayerShape, w1: Tensor,
        *w2: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, w1, *w2)
        ctx.scale, ctx.shape = scale, shape
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            images, mixer, up, *kernels = cast(dtype, x, _by_group(w1, shape), *w2)
            hidden, _inner = _slid(_split(images, _count(mixer, 2)), kernels, shape)  # (N * B, r, *positions)
            delta = shape.mix(_mixed(mixer * scale, hidden), up)  # (N * A, C, *positions)
            y = _onto_base(images, weight, bias, shape, delta)
        return as_output(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        shape, needs_x, dtype = ctx.shape, ctx.needs_input_grad[0], working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            images, grad, mixer, up, *kernels = cast(dtype, x, grad, _by_group(factors[0], shape), *factors[1:])
            scaled, one = mixer * ctx.scale, shape.ungrouped
            blocks = _split(images, _count(mixer, 2))
            hidden, inner = _slid(blocks, kernels, shape)
            grad_mixed, grad_up = shape.mix_gradients(_split(grad, _count(mixer, 1)), _mixed(scaled, hidden), up)  # (N * A, r, *positions)
            grad_mixer = _image_products(grad_mixed, hidden, mixer).mul_(ctx.scale)
            grad_hidden = _mixed(scaled.mT, grad_mixed)
            if inner is None:
                grad_x, *grad_kernels = one.gradients(grad_hidden, blocks, _kernel(kernels[0], shape), needs_x=needs_x)
            else:
                grad_inner, grad_core = one.gradients(grad_hidden, inner, kernels[1])
                grad_x, grad_down = shape.mix_gradients(grad_inner, blocks, kernels[0])
                grad_kernels = [grad_down, grad_core]
            grad_x = _with_base(grad_x if needs_x else None, grad, images, weight, shape)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return grad_x, None, None, None, None, None, *like(factors, [grad_mixer, grad_up, *grad_kernels])


class _WholeConvolution(torch.autograd.Function):
    """Images x (N, B * D, *positions), with w2 whole."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, mixes_first: bool, shape: LayerShape, w1: Tensor,
        w2: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, w1, w2)
        ctx.scale, ctx.shape = scale, shape
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            images, mixer, kernel = cast(dtype, x, _by_group(w1 * scale, shape), w2)
            blocks, one = _split(images, _count(mixer, 2)), shape.ungrouped
            delta = one.apply(_mixed(mixer, blocks), kernel) if mixes_first else _mixed(mixer, one.apply(blocks, kernel))
            y = _onto_base(images, weight, bias, shape, delta)
        return as_output(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        shape, dtype = ctx.shape, working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            images, grad, mixer, kernel = cast(dtype, x, grad, _by_group(factors[0], shape), factors[1])
            blocks, scaled = _split(images, _count(mixer, 2)), mixer * ctx.scale
            # the gradients at the mixed input, through w2 alone: both of w1 and of x follow from it by small sums
            through, grad_kernel = shape.ungrouped.gradients(_split(grad, _count(mixer, 1)), _mixed(scaled, blocks), kernel)
            grad_mixer = _image_products(through, blocks, mixer).mul_(ctx.scale)
            grad_x = _mixed(scaled.mT, through) if ctx.needs_input_grad[0] else None
            grad_x = _with_base(grad_x, grad, images, weight, shape)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return grad_x, None, None, None, None, None, *like(factors, [grad_mixer, grad_kernel])


# Blocks


def _blocks(rows: Tensor, count: int) -> Tensor:
    """Rows (M, count * D) as (M, count, D)."""
    return rows.view(rows.shape[0], count, rows.shape[1] // count)


def _through(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Every row of blocks (M, B, D) through a matrix (D, C): (M, B, C)."""
    return torch.mm(blocks.view(-1, blocks.shape[2]), matrix).view(*blocks.shape[:2], matrix.shape[1])


def _mix(mixer: Tensor, blocks: Tensor, is_fused: bool) -> Tensor:
    """mixer (A, B) @ blocks (M, B, C): (M, A, C)."""
    return kronecker_mix(mixer, blocks) if is_fused else torch.matmul(mixer, blocks)


def _mix_onto(y: Tensor, mixer: Tensor, blocks: Tensor, beta: float, scale: float, is_fused: bool) -> None:
    """y (M, A, C) becomes beta * y + scale * mixer @ blocks, for blocks (M, B, C)."""
    if is_fused and beta:
        kronecker_mix(mixer, blocks, y, scale)
    else:
        y.baddbmm_(mixer.expand(y.shape[0], -1, -1), blocks, beta=beta, alpha=scale)


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over M of left (M, A, D) @ right (M, B, D)^T: (A, B)."""
    return torch.bmm(left, right.transpose(1, 2)).sum(0)


# Images


def _split(images: Tensor, count: int) -> Tensor:
    """Images (N, count * D, *positions) as (N * count, D, *positions)."""
    return images.reshape(images.shape[0] * count, images.shape[1] // count, *images.shape[2:])


def _kernel(down: Tensor, shape: LayerShape) -> Tensor:
    """w2_b (r, D * kernel) as the weight of a convolution."""
    return down.view(down.shape[0], -1, *shape.kernel)


def _slid(blocks: Tensor, kernels: list[Tensor], shape: LayerShape) -> tuple[Tensor, Tensor | None]:
    """Images (N * B, D, *positions) through w2_b to its ranks; where a core slides instead, also what it slides over."""
    if len(kernels) == 1:
        return shape.ungrouped.apply(blocks, _kernel(kernels[0], shape)), None
    inner = shape.mix(blocks, kernels[0])
    return shape.ungrouped.apply(inner, kernels[1]), inner


def _by_group(w1: Tensor, shape: LayerShape) -> Tensor:
    """w1 (A, B) as (groups, A / groups, B): its rows are those of the weight's groups in turn."""
    return w1.view(shape.groups, w1.shape[0] // shape.groups, w1.shape[1])


def _count(mixer: Tensor, side: int) -> int:
    """How many blocks the outputs (side 1) or the inputs (side 2) of all groups have."""
    return mixer.shape[0] * mixer.shape[side]


def _mixed(mixer: Tensor, images: Tensor) -> Tensor:
    """Images (N * groups * B, C, *positions) mixed over B by a mixer (groups, A, B): (N * groups * A, C, *positions)."""
    groups, _, b = mixer.shape
    return torch.matmul(mixer, images.reshape(-1, groups, b, images.shape[1:].numel())).view(-1, *images.shape[1:])


def _image_products(left: Tensor, right: Tensor, mixer: Tensor) -> Tensor:
    """Sum over images and positions of left (N * groups * A, ...) times right (N * groups * B, ...): (groups, A, B)."""
    (groups, a, b), size = mixer.shape, left.shape[1:].numel()
    return torch.matmul(left.reshape(-1, groups, a, size), right.reshape(-1, groups, b, size).mT).sum(0)


def _onto_base(images: Tensor, weight: Tensor | None, bias: Tensor | None, shape: LayerShape, delta: Tensor) -> Tensor:
    """The delta (N * A, C, *positions) as (N, A * C, *positions), on the base's output where there is a weight."""
    delta = delta.reshape(images.shape[0], shape.out, *delta.shape[2:])
    if weight is None:
        return delta
    dtype = images.dtype
    return shape.apply(images, weight.to(dtype), None if bias is None else bias.to(dtype)).add_(delta)


def _with_base(grad_x: Tensor | None, grad: Tensor, images: Tensor, weight: Tensor | None, shape: LayerShape) -> Tensor | None:
    """The delta's input gradient in the input's shape, with the base's on top."""
    if grad_x is None:
        return None
    grad_x = grad_x.reshape(images.shape)
    return grad_x if weight is None else grad_x.add_(shape.gradients(grad, images, weight.to(grad.dtype), needs_weight=False)[0])
