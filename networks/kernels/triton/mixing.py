"""LoKr's small first factor on the blocks of every token: many tiny products as a few large ones, in one pass over memory."""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from networks.kernels.products import without_autocast
from networks.kernels.triton.machine import can_read, ceil_div, check_outside_graphs, launch, power_of_2, precision, register

MOST_SIDES: Final = 128  # of w1: all its rows are held at once
WIDTHS: Final = (128, 64, 32, 16)


class Tile(NamedTuple):
    """How many of w1's columns a program takes at a time, its columns of the result (tokens times width), and its warps."""

    inner: int
    columns: int
    warps: int


# By the rows of w1, for half precision and float32: a small w1 moves few bytes a column, so its programs take more of them. The largest
# that keep their registers, found by compiling for compute capabilities 8.0 to 12.0.
TILES: Final = {
    2: {16: Tile(16, 256, 4), 32: Tile(32, 128, 4), 64: Tile(32, 128, 4), 128: Tile(32, 128, 8)},
    4: {16: Tile(16, 128, 4), 32: Tile(16, 128, 4), 64: Tile(16, 64, 4), 128: Tile(16, 64, 8)},
}


def kronecker_mix(w1: Tensor, blocks: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale * w1 @ blocks for w1 (A, B) and blocks (M, B, C): (M, A, C), summed in float32 and rounded once.

    With `out` (M, A, C) it is added to that in place, before the rounding, and `out` returned. Result and `out` have the dtype of `blocks`,
    to which w1, of any float dtype, is rounded.
    """
    if not torch.compiler.is_compiling() or not supports_kronecker_mix(w1, blocks, out):
        return _mix(w1, blocks, out, scale)
    if out is None:
        return torch.ops.hadron.kronecker_mix(w1, blocks, scale)
    torch.ops.hadron.kronecker_mix_(w1, blocks, out, scale)
    return out


def supports_kronecker_mix(w1: Tensor, blocks: Tensor, out: Tensor | None = None) -> bool:
    """Whether the kernel computes this: sides of w1 up to `MOST_SIDES`, contiguous blocks and a contiguous `out` of their dtype."""
    if not can_read(w1, blocks, out) or max(w1.shape) > MOST_SIDES or not blocks.is_contiguous():
        return False
    return out is None or (out.is_contiguous() and out.dtype == blocks.dtype)


def composed_kronecker_mix(w1: Tensor, blocks: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`kronecker_mix` in PyTorch: a batch of small products."""
    mixer = w1.to(blocks.dtype).expand(blocks.shape[0], -1, -1)
    with without_autocast(blocks):
        if out is not None:
            return out.baddbmm_(mixer, blocks, alpha=scale)
        return _empty_mix(w1, blocks).baddbmm_(mixer, blocks, beta=0, alpha=scale)


# Choosing and launching


def _mix(w1: Tensor, blocks: Tensor, out: Tensor | None, scale: float) -> Tensor:
    if not supports_kronecker_mix(w1, blocks, out):
        return composed_kronecker_mix(w1, blocks, out, scale)
    from networks.kernels.triton.mixing_kernels import mix_kernel

    check_outside_graphs(w1, blocks, out)
    result = _empty_mix(w1, blocks) if out is None else out
    (outer, inner), (tokens, _, width) = w1.shape, blocks.shape
    rows = power_of_2(outer, 16)
    tile, across = TILES[blocks.itemsize][rows], block_width(width)
    together = tile.columns // across
    launch(
        mix_kernel, (ceil_div(tokens, together), ceil_div(width, across)), result,
        w1, blocks, result, scale, tokens, outer, inner, width, *w1.stride(),
        ACCUMULATES=out is not None, PRECISION=precision(blocks.dtype), OUTER=rows, INNER=tile.inner, TOKENS=together, WIDTH=across,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return result


def block_width(width: int) -> int:
    """How many columns of one token a program takes: a power of two, the larger the better, with at most an eighth of them idle.

    Rows of 16 are whole sectors of memory; below, a program takes them all.
    """
    if width <= WIDTHS[-1]:
        return power_of_2(width)
    return next((size for size in WIDTHS if 8 * size * ceil_div(width, size) <= 9 * width), WIDTHS[-1])


def _empty_mix(w1: Tensor, blocks: Tensor, scale: float = 1.0) -> Tensor:
    return blocks.new_empty(blocks.shape[0], w1.shape[0], blocks.shape[2])


def _mix_into(w1: Tensor, blocks: Tensor, out: Tensor, scale: float) -> None:
    _mix(w1, blocks, out, scale)


register(
    "kronecker_mix(Tensor w1, Tensor blocks, float scale) -> Tensor",
    lambda w1, blocks, scale: _mix(w1, blocks, None, scale),
    _empty_mix,
)
register("kronecker_mix_(Tensor w1, Tensor blocks, Tensor(a!) out, float scale) -> ()", _mix_into, lambda w1, blocks, out, scale: None)
