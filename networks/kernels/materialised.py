"""y = (W + s dW) x + b with dW made where it is needed and never kept: only the input and the factors wait for the backward pass.

Where rank and tokens make this cheaper than the factors in turn, and for grouped convolutions. In float32 one product with W + s dW
serves base and delta. In half precision their sum would lose a small delta, so the output comes from two products that are rounded once
together; only the input gradient goes through the rounded sum, whose error there is a last bit of W, not a lost delta.
dW is made, used and forgotten in blocks of rows that stay in a processor's caches, so that it never stands in memory as a whole.
"""

# An autograd function's `backward` takes as many gradients as it has outputs:
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from networks.kernels.products import NO_BASE, Base, as_output, cast, convolved, joined_product, like, run, without_autocast, working_dtype
from networks.kernels.triton.hadamard import hadamard_gradients, hadamard_weight
from networks.layers import LayerShape

BLOCK = {"cpu": 1 << 20}  # elements of a block of dW; on other devices BLOCK_ELSEWHERE, for every block is a launch there
BLOCK_ELSEWHERE = 1 << 26


class Formula(Protocol):
    """What some factors mean as a matrix (out, inner * kernel), and how its gradient becomes theirs, for a block of its rows."""

    by_rows: ClassVar[tuple[bool, ...]]  # which factors are divided with the rows of the matrix; the others count in every block

    def unit(self, factors: list[Tensor]) -> int:
        """How many rows of the matrix one row of a divided factor stands for."""
        ...

    def parts(self, factors: list[Tensor]) -> tuple[Tensor, ...]:
        """Matrices from which `weight` and `gradients` follow, made once for both."""
        ...

    def weight(self, factors: list[Tensor], parts: tuple[Tensor, ...], scale: float, onto: Tensor | None) -> Tensor:
        """The scaled delta, added to `onto` (rows, inner * kernel) where that is given."""
        ...

    def gradients(self, grad: Tensor, factors: list[Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
        """The factors' gradients for `grad`, that of the unscaled delta."""
        ...


class Product:
    """LoRA: up (out, r) @ down (r, ...)."""

    by_rows: ClassVar[tuple[bool, ...]] = (True, False)

    def unit(self, factors: list[Tensor]) -> int:
        return 1

    def parts(self, factors: list[Tensor]) -> tuple[Tensor, ...]:
        return ()

    def weight(self, factors: list[Tensor], parts: tuple[Tensor, ...], scale: float, onto: Tensor | None) -> Tensor:
        up, down = factors
        if onto is None:
            return (up * scale) @ down
        return torch.addmm(onto, up, down, alpha=scale)

    def gradients(self, grad: Tensor, factors: list[Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
        up, down = factors
        return [grad @ down.t(), up.t() @ grad]


class Hadamard:
    """LoHa: (a1 @ b1) * (a2 @ b2), of a (out, r) and b (r, ...)."""

    by_rows: ClassVar[tuple[bool, ...]] = (True, False, True, False)

    def unit(self, factors: list[Tensor]) -> int:
        return 1

    def parts(self, factors: list[Tensor]) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = factors
        return a1 @ b1, a2 @ b2

    def weight(self, factors: list[Tensor], parts: tuple[Tensor, ...], scale: float, onto: Tensor | None) -> Tensor:
        first, second = parts
        return (first * second).mul_(scale) if onto is None else torch.addcmul(onto, first, second, value=scale)

    def gradients(self, grad: Tensor, factors: list[Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
        a1, b1, a2, b2 = factors
        first, second = parts
        grad_first, grad_second = grad * second, grad * first
        return [grad_first @ b1.t(), a1.t() @ grad_first, grad_second @ b2.t(), a2.t() @ grad_second]


class FusedHadamard(Hadamard):
    """LoHa's by Triton kernels, where there can be some: neither product ever stands in memory."""

    def parts(self, factors: list[Tensor]) -> tuple[Tensor, ...]:
        return ()

    def weight(self, factors: list[Tensor], parts: tuple[Tensor, ...], scale: float, onto: Tensor | None) -> Tensor:
        a1, b1, a2, b2 = factors
        return hadamard_weight(a1, b1, a2, b2, scale, onto)

    def gradients(self, grad: Tensor, factors: list[Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
        a1, b1, a2, b2 = factors
        return list(hadamard_gradients(grad, a1, b1, a2, b2))


class Kronecker:
    """LoKr: kron(w1, w2) over rows and inner channels, of w1 (A, B) and w2 (C, D, kernel positions)."""

    by_rows: ClassVar[tuple[bool, ...]] = (True, False)

    def unit(self, factors: list[Tensor]) -> int:
        return factors[1].shape[0]

    def parts(self, factors: list[Tensor]) -> tuple[Tensor, ...]:
        return ()

    def weight(self, factors: list[Tensor], parts: tuple[Tensor, ...], scale: float, onto: Tensor | None) -> Tensor:
        w1, w2 = factors
        (a, b), (c, d, k) = w1.shape, w2.shape
        left, right = w1.view(a, 1, b, 1, 1), w2.view(1, c, 1, d, k)
        if onto is None:
            return (left * scale * right).view(a * c, b * d * k)
        return torch.addcmul(onto.view(a, c, b, d, k), left, right, value=scale).view(a * c, b * d * k)

    def gradients(self, grad: Tensor, factors: list[Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
        w1, w2 = factors
        blocks = grad.view(w1.shape[0], w2.shape[0], w1.shape[1], *w2.shape[1:])
        return [torch.einsum("acbdk,cdk->ab", blocks, w2), torch.einsum("acbdk,ab->cdk", blocks, w1)]


def materialised(
    x: Tensor, factors: tuple[Tensor, ...], formula: Formula, scale: float, shape: LayerShape, base: Base | None = None
) -> Tensor:
    """The scaled delta of `x` (..., in) or (batch, in, *positions), with `base` the layer's whole output, in the dtype of `x`.

    `factors` are what `formula` takes, in any float dtype; gradients come back in theirs.
    """
    weight, bias, strength = base or NO_BASE
    scale = scale * strength
    if shape.kernel:
        return convolved(x, shape, lambda x, shape: run(_Convolved, x, weight, bias, scale, formula, shape, *factors))
    y = run(_Linear, x.reshape(-1, x.shape[-1]), weight, bias, scale, formula, shape.out, *factors)
    return y.view(*x.shape[:-1], shape.out)


class _Linear(torch.autograd.Function):
    """Of rows x (M, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, formula: Formula, out: int, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.scale, ctx.formula = scale, formula
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            rows, *wide = cast(dtype, x, *factors)
            is_merged = weight is not None and dtype.itemsize >= 4

            def write(y: Tensor, beta: float) -> None:
                for block, own in _blocks(formula, wide, out, x):
                    total = formula.weight(own, formula.parts(own), scale, weight[block].to(dtype) if is_merged else None)  # pyright: ignore[reportOptionalSubscript]
                    y[:, block].addmm_(rows, total.t(), beta=beta)

            if is_merged:
                y = rows.new_empty(rows.shape[0], out) if bias is None else bias.to(dtype).expand(rows.shape[0], out).clone()
                write(y, 0.0 if bias is None else 1.0)
            else:
                y = joined_product(rows, weight, bias, out, write)
        return as_output(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        dtype = working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            rows, grad, *wide = cast(dtype, x, grad, *factors)
            grad_x, gradients = None, _Gradients(ctx.formula)
            for block, own in _blocks(ctx.formula, wide, grad.shape[1], x):
                parts, columns = ctx.formula.parts(own), grad[:, block]
                if ctx.needs_input_grad[0]:
                    total = ctx.formula.weight(own, parts, ctx.scale, None if weight is None else weight[block].to(dtype))
                    grad_x = columns @ total if grad_x is None else grad_x.addmm_(columns, total)
                    del total
                grad_weight = grad.new_empty(columns.shape[1], x.shape[1]).addmm_(columns.t(), rows, beta=0, alpha=ctx.scale)
                gradients.add(ctx.formula.gradients(grad_weight, own, parts))
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, None, *gradients.like(factors)


class _Convolved(torch.autograd.Function):
    """Of images x (batch, in, *positions)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, formula: Formula, shape: LayerShape, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.scale, ctx.formula, ctx.shape = scale, formula, shape
        dtype = working_dtype(x.dtype, x.device.type)
        with without_autocast(x):
            images, *wide = cast(dtype, x, *factors)
            bias = None if bias is None else bias.to(dtype)
            if weight is not None and dtype.itemsize >= 4:
                return as_output(shape.apply(images, _whole(formula, wide, scale, shape, x, weight.to(dtype)), bias), x.dtype)
            y = shape.apply(images, _whole(formula, wide, scale, shape, x))
            if weight is not None:
                y += shape.apply(images, weight.to(dtype), bias)
        return as_output(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *factors = ctx.saved_tensors
        shape, formula, dtype = ctx.shape, ctx.formula, working_dtype(grad.dtype, grad.device.type)
        with without_autocast(grad):
            images, grad, *wide = cast(dtype, x, grad, *factors)
            needs_x, gradients = ctx.needs_input_grad[0], _Gradients(formula)
            grad_weight = shape.gradients(grad, images, grad.new_empty(shape.weight), needs_x=False)[1].flatten(1)
            total = grad.new_empty(shape.out, shape.fan_in) if needs_x else None
            for block, own in _blocks(formula, wide, shape.out, x):
                parts = formula.parts(own)
                if total is not None:
                    onto = None if weight is None else weight[block].flatten(1).to(dtype)
                    total[block] = formula.weight(own, parts, ctx.scale, onto)
                gradients.add(formula.gradients(grad_weight[block].mul_(ctx.scale), own, parts))
            grad_x = None if total is None else shape.gradients(grad, images, total.view(shape.weight), needs_weight=False)[0]
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, None, *gradients.like(factors)


class _Gradients:
    """The factors' gradients, gathered block by block: divided factors in a row, the others summed."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.found: list[list[Tensor]] = []

    def add(self, gradients: list[Tensor]) -> None:
        """Those of one more block."""
        if not self.found:
            self.found = [[gradient] for gradient in gradients]
            return
        for is_divided, found, gradient in zip(self.formula.by_rows, self.found, gradients, strict=True):
            if is_divided:
                found.append(gradient)
            else:
                found[0] += gradient

    def like(self, factors: list[Tensor]) -> list[Tensor]:
        """All of them, in the shapes and dtypes of the stored factors."""
        whole = [found[0] if len(found) == 1 else torch.cat(found) for found in self.found]
        return like(factors, whole)


def _blocks(formula: Formula, factors: list[Tensor], out: int, x: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of the matrix's rows, and the factors of each."""
    unit, limit = formula.unit(factors), BLOCK.get(x.device.type, BLOCK_ELSEWHERE)
    fan_in = factors[-1].numel() // factors[-1].shape[0] if unit == 1 else factors[0].shape[1] * (factors[1].numel() // unit)
    step = max(1, limit // (unit * fan_in))
    for start in range(0, out // unit, step):
        stop = min(start + step, out // unit)
        own = [factor[start:stop] if is_divided else factor for factor, is_divided in zip(factors, formula.by_rows, strict=True)]
        yield slice(start * unit, stop * unit), own


def _whole(formula: Formula, factors: list[Tensor], scale: float, shape: LayerShape, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """The scaled delta in the weight's shape, added to `onto` where that is given."""
    total = factors[0].new_empty(shape.out, shape.fan_in)
    for block, own in _blocks(formula, factors, shape.out, x):
        total[block] = formula.weight(own, formula.parts(own), scale, None if onto is None else onto[block].flatten(1))
    return total.view(shape.weight)
