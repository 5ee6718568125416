"""DoRA: W' = m * (W + D) / |W + D|, a magnitude learned apart from the direction.

Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5.

m has one number for each output (rows of the weight, the paper's implementations) or each input channel (LyCORIS' `wd_on_output=False`).
With g = m / |W + D| the output is `g * (W x + D x)` or `W (g x) + D (g x)`: a gain, so neither W + D nor D is formed, and a
quantised base is as good as any. The norm follows from |W|^2 + 2 <W, D> + |D|^2, one pass over W.
"""

from typing import Literal

import torch
from torch import Tensor

from networks.layers import LayerShape

Axis = Literal["out", "in"]
SUMMED: dict[Axis, tuple[int, int]] = {"out": (1, 2), "in": (0, 2)}  # dimensions of (out, inner, kernel) that a norm runs over
BASE_NORM_MARK = ("dora_norm", "base weight")  # metadata of files whose magnitudes are over |W| instead of |W + D|, as ComfyUI has it
Overlap = tuple[Tensor, Tensor]
"""<W, D> and |D|^2 for each output or input channel: two vectors."""


def axis_of(shape: LayerShape, magnitude: Tensor, name: str) -> Axis:
    """The axis that a file's `dora_scale` stands on: (out, 1, ...), also flat, or (1, inner, 1, ...).

    Raises `ValueError` for any other shape.
    """
    if magnitude.dim() > 0 and magnitude.shape[0] == shape.out and magnitude.numel() == shape.out:
        return "out"
    if magnitude.dim() > 1 and magnitude.shape[1] == shape.inner and magnitude.numel() == shape.inner:
        return "in"
    expected = " or ".join(str(list(magnitude_shape(shape, axis))) for axis in SUMMED)
    raise ValueError(f"{name}.dora_scale has the shape {list(magnitude.shape)}; {expected} was expected")


def magnitude_shape(shape: LayerShape, axis: Axis) -> tuple[int, ...]:
    """The shape of `dora_scale` in files: the weight's, with ones but for the axis."""
    ones = (1,) * len(shape.kernel)
    return (shape.out, 1, *ones) if axis == "out" else (1, shape.inner, *ones)


def squared_norms(weight: Tensor, axis: Axis) -> Tensor:
    """|W|^2 of (out, inner, kernel) for each output or input channel."""
    return torch.linalg.vector_norm(weight, dim=SUMMED[axis]).square()


def overlap_of_dense(delta: Tensor, weight: Tensor, axis: Axis) -> Overlap:
    """The overlap of a delta in hand with W, both (out, inner, kernel)."""
    return (delta * weight).sum(SUMMED[axis]), delta.square().sum(SUMMED[axis])


def overlap_of_product(up: Tensor, down: Tensor, weight: Tensor, axis: Axis) -> Overlap:
    """The overlap of D = up @ down, (out, r) and (r, inner * kernel), with W (out, inner, kernel), by rank-sized products."""
    if axis == "out":
        seen = weight.flatten(1) @ down.T
        return (seen * up).sum(1), ((up @ (down @ down.T)) * up).sum(1)
    down = down.unflatten(1, weight.shape[1:])  # (r, inner, kernel)
    seen = (up.T @ weight.flatten(1)).view_as(down)
    mixed = ((up.T @ up) @ down.flatten(1)).view_as(down)
    return (seen * down).sum((0, 2)), (mixed * down).sum((0, 2))


def overlap_of_kronecker(w1: Tensor, w2: Tensor, weight: Tensor, axis: Axis) -> Overlap:
    """The overlap of D = kron(w1, w2), (A, B) and (C, D, kernel), with W (A * C, B * D, kernel)."""
    a, b = w1.shape
    c, d, kernel = w2.shape
    blocks = weight.view(a, c, b, d, kernel)
    squares = (w1.square(), w2.square())
    if axis == "out":
        seen = torch.einsum("acbdk,ab->acdk", blocks, w1)
        cross = (seen * w2).sum((2, 3)).flatten()
        return cross, torch.outer(squares[0].sum(1), squares[1].sum((1, 2))).flatten()
    seen = torch.einsum("acbdk,ab->cbdk", blocks, w1)
    cross = torch.einsum("cbdk,cdk->bd", seen, w2).flatten()
    return cross, torch.outer(squares[0].sum(0), squares[1].sum((0, 2))).flatten()
