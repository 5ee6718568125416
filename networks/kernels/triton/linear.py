"""A frozen layer's product and a small one added to it, in one kernel that rounds once; forwards, backwards, and for layers of one input.

Where the small product is a second kernel, it reads and writes the whole output again. Here it is a few more steps of the same sum.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from networks.kernels.products import without_autocast
from networks.kernels.triton.machine import can_read, ceil_div, check_outside_graphs, launch, power_of_2, precision, register


class Tile(NamedTuple):
    """A program's share of the output, the steps of the sum it takes at a time, its warps, and how many steps are fetched ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By tokens, for half precision and float32: few tokens get flat tiles, for more programs. The largest that keep their registers and fit the
# 99 KiB of shared memory of the smallest GPUs, found by compiling for compute capabilities 8.0 to 12.0.
TILES: Final = {
    2: {64: Tile(64, 64, 64, 4, 3), 256: Tile(64, 128, 64, 4, 3), 1 << 62: Tile(128, 128, 64, 8, 3)},
    4: {1 << 62: Tile(64, 64, 16, 4, 2)},
}


def extended_linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """x W^T + bias + scale * hidden up^T of x (..., in), W (out, in), hidden (..., r), up (out, r): (..., out), rounded once.

    `weight` has the dtype of `x`, the others any; `hidden` and `up` are rounded to that of `x`, and sums are float32.
    """
    return extended_linears(x, [weight], [bias], [hidden], [up], scale)[0]


def extended_linear_input_gradient(grad: Tensor, weight: Tensor, grad_hidden: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """grad W + scale * grad_hidden down of grad (..., out), W (out, in), grad_hidden (..., r), down (r, in): (..., in), rounded once."""
    return extended_linear(grad, weight.T, None, grad_hidden, down.T, scale)


def extended_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hiddens: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float = 1.0,
) -> list[Tensor]:
    """`extended_linear` of layers that share their input (q, k, v), in one launch: an output each. One rank; their widths may differ."""
    if torch.compiler.is_compiling() and supports_extended_linears(x, weights, biases, hiddens, ups):
        given = [bias for bias in biases if bias is not None]
        return torch.ops.hadron.extended_linears(x, list(weights), given, list(hiddens), list(ups), scale)
    return _linears(x, weights, biases, hiddens, ups, scale)


def supports_extended_linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor) -> bool:
    """Whether the kernel computes `extended_linear` of these."""
    return supports_extended_linears(x, [weight], [bias], [hidden], [up])


def supports_extended_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], hiddens: Sequence[Tensor], ups: Sequence[Tensor]
) -> bool:
    """Whether the kernel computes this: weights in the input's dtype, and layers alike in rank, strides, dtypes and having a bias."""
    if not can_read(x, *weights, *biases, *hiddens, *ups) or any(weight.dtype != x.dtype for weight in weights):
        return False
    if any(1 not in matrix.stride() for matrix in (*weights, *ups)) or any(bias is not None and bias.stride() != (1,) for bias in biases):
        return False
    kinds = {
        (weight.stride(), up.stride(), up.dtype, up.shape[1], hidden.dtype, _rows(hidden).stride(), None if bias is None else bias.dtype)
        for weight, bias, hidden, up in zip(weights, biases, hiddens, ups, strict=True)
    }
    return len(kinds) == 1


def composed_extended_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hiddens: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float = 1.0,
) -> list[Tensor]:
    """`extended_linears` in PyTorch."""
    layers = zip(weights, biases, hiddens, ups, strict=True)
    return [composed_extended_linear(x, weight, bias, hidden, up, scale) for weight, bias, hidden, up in layers]


def composed_extended_linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """`extended_linear` in PyTorch: the delta first, so that the base's sum takes it in before it is rounded; the bias rounds again."""
    hidden, up = hidden.to(x.dtype), up.to(x.dtype)
    with without_autocast(x):
        rows = _rows(hidden)
        y = rows.new_empty(rows.shape[0], up.shape[0]).addmm_(rows, up.T, beta=0, alpha=scale).addmm_(_rows(x), weight.T)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], weight.shape[0])


# Choosing and launching


def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hiddens: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:
    if not supports_extended_linears(x, weights, biases, hiddens, ups):
        return composed_extended_linears(x, weights, biases, hiddens, ups, scale)
    from networks.kernels.triton.linear_kernels import linear_kernel

    check_outside_graphs(x, *weights, *biases, *hiddens, *ups)
    rows, small = _contiguous_rows(x), [_contiguous_rows(hidden) for hidden in hiddens]
    results = _empty_results(x, weights)
    (tokens, inner), rank, outs = rows.shape, ups[0].shape[1], tuple(weight.shape[0] for weight in weights)
    tile = tile_for(tokens, x.itemsize)
    programs = ceil_div(tokens, tile.rows) * max(ceil_div(out, tile.columns) for out in outs)
    launch(
        linear_kernel, (programs, len(outs)), results[0],
        rows, tuple(weights), tuple(biases), tuple(small), tuple(ups), tuple(results), scale, tokens, outs, inner, rank,
        rows.stride(0), *weights[0].stride(), small[0].stride(0), *ups[0].stride(),
        LAYERS=len(outs), PRECISION=precision(x.dtype), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        RANKS=min(power_of_2(rank, 16), tile.depth), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return results


def tile_for(tokens: int, itemsize: int) -> Tile:
    """The tile for so many tokens in a dtype of so many bytes."""
    return next(tile for most, tile in TILES[itemsize].items() if tokens <= most)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _contiguous_rows(x: Tensor) -> Tensor:
    """(..., n) as a matrix whose rows are contiguous, copied only where they are not."""
    rows = _rows(x)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _empty_results(x: Tensor, weights: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _run_operator(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], hiddens: list[Tensor], ups: list[Tensor], scale: float
) -> list[Tensor]:
    """The operator's form, whose schema has no lists of maybe tensors with gradients: no biases at all, or one for every layer."""
    return _linears(x, weights, biases or [None] * len(weights), hiddens, ups, scale)


register(
    "extended_linears(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] hiddens, Tensor[] ups, float scale) -> Tensor[]",
    _run_operator,
    _empty_results,
)
