"""LoHa's delta in one pass over the weight, and the gradients of its factors in one pass over the delta's.

(a1 b1) * (a2 b2) read and written whole takes three passes of float32 for the delta and six for its gradients. Here a tile is one program:
both products are made of factor blocks in registers and never written.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from networks.kernels.products import without_autocast
from networks.kernels.triton.machine import FLOATS, can_read, ceil_div, check_outside_graphs, launch, power_of_2, precision, register, wide

MOST_RANKS: Final = 64  # of the gradients: all ranks of a tile are held at once
PROGRAMS: Final = 128  # about one for each multiprocessor of a large GPU, and a constant: sums do not depend on which


class Tile(NamedTuple):
    """A program's share of the weight, the ranks it takes at a time, and its warps."""

    rows: int
    columns: int
    ranks: int
    warps: int


# By rank, for results of half precision (TF32) and of float32 (IEEE). Found by compiling for compute capabilities 8.0 to 12.0: the largest
# tiles that keep all but a few registers and fit shared memory. Wide ones read factors less often; tall and wide ones make fewer partial
# sums. Exact float32 products run outside tensor cores and hold more in registers, so their tiles are smaller.
WEIGHT_TILES: Final = {
    "tf32": {16: Tile(128, 64, 16, 8), 32: Tile(128, 64, 32, 8)},
    "ieee": {16: Tile(64, 64, 16, 8)},
}
GRADIENT_TILES: Final = {
    "tf32": {16: Tile(128, 32, 16, 8), 32: Tile(128, 32, 32, 8), 64: Tile(64, 16, 64, 8)},
    "ieee": {16: Tile(64, 32, 16, 8), 32: Tile(64, 32, 32, 8), 64: Tile(32, 32, 64, 8)},
}


def hadamard_weight(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """scale * (a1 b1) * (a2 b2) [+ base] of a (out, r) and b (r, fan-in): (out, fan-in), summed in float32 and rounded once.

    Factors and `base` (out, fan-in) may be of any float dtype each; the result is in `dtype`, else the base's, else the factors'.
    """
    if torch.compiler.is_compiling() and supports_hadamard_weight(a1, b1, a2, b2, base, dtype):
        return torch.ops.hadron.hadamard_weight(a1, b1, a2, b2, scale, base, dtype)
    return _weight(a1, b1, a2, b2, scale, base, dtype)


def supports_hadamard_weight(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> bool:
    """Whether the kernel computes this: factors of two like pairs, and a contiguous base."""
    if not can_read(a1, b1, a2, b2, base) or not _are_alike(a1, b1, a2, b2) or dtype not in (None, *FLOATS):
        return False
    return base is None or (base.is_contiguous() and base.shape == (a1.shape[0], b1.shape[1]))


def composed_hadamard_weight(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`hadamard_weight` in PyTorch."""
    dtype = _result_dtype(a1, base, dtype)
    a1, b1, a2, b2 = (factor.to(wide(factor.dtype)) for factor in (a1, b1, a2, b2))
    with without_autocast(a1):
        delta = (a1 @ b1).mul_(a2 @ b2).mul_(scale)
    return (delta if base is None else delta.add_(base)).to(dtype)


def hadamard_gradients(
    grad_weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a1 (out, r), b1 (r, fan-in), a2 and b2 in float32, for that of `hadamard_weight`'s result (out, fan-in).

    Equal bytes for equal inputs, on whichever GPU: partial sums in a fixed order.
    """
    if not supports_hadamard_gradients(grad_weight, a1, b1, a2, b2):
        return composed_hadamard_gradients(grad_weight, a1, b1, a2, b2, scale)
    run = torch.ops.hadron.hadamard_gradients if torch.compiler.is_compiling() else _gradients
    (grad_a1, grad_a2), (grad_b1, grad_b2) = run(grad_weight, a1, b1, a2, b2, scale)
    return grad_a1, grad_b1, grad_a2, grad_b2


def supports_hadamard_gradients(grad_weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> bool:
    """Whether the kernel computes this: factors of two like pairs with at most `MOST_RANKS`, and a contiguous gradient."""
    if not can_read(grad_weight, a1, b1, a2, b2) or not _are_alike(a1, b1, a2, b2) or b1.shape[0] > MOST_RANKS:
        return False
    return grad_weight.is_contiguous() and grad_weight.shape == (a1.shape[0], b1.shape[1])


def composed_hadamard_gradients(
    grad_weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hadamard_gradients` in PyTorch; of float64 in float64."""
    grad, a1, b1, a2, b2 = (tensor.to(wide(tensor.dtype)) for tensor in (grad_weight, a1, b1, a2, b2))
    with without_autocast(grad):
        first = (a2 @ b2).mul_(grad).mul_(scale)
        second = (a1 @ b1).mul_(grad).mul_(scale)
        return first @ b1.T, a1.T @ first, second @ b2.T, a2.T @ second


# Choosing and launching


def _weight(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    if not supports_hadamard_weight(a1, b1, a2, b2, base, dtype):
        return composed_hadamard_weight(a1, b1, a2, b2, scale, base, dtype)
    from networks.kernels.triton.hadamard_kernels import weight_kernel

    check_outside_graphs(a1, b1, a2, b2, base)
    result = _empty_weight(a1, b1, a2, b2, scale, base, dtype)
    (rows, columns), rank = result.shape, b1.shape[0]
    exactness = precision(result.dtype)
    tiles = WEIGHT_TILES[exactness]
    tile = tiles[min(power_of_2(rank, 16), max(tiles))]
    launch(
        weight_kernel, (ceil_div(rows, tile.rows), ceil_div(columns, tile.columns)), result,
        a1, b1, a2, b2, base, result, scale, rows, columns, rank, *a1.stride(), *b1.stride(),
        PRECISION=exactness, ROWS=tile.rows, COLUMNS=tile.columns, RANKS=tile.ranks, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return result


def _gradients(grad_weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Those of a1 and a2 (2, out, r), and of b1 and b2 (2, r, fan-in): an operator's results may not share memory."""
    if not supports_hadamard_gradients(grad_weight, a1, b1, a2, b2):
        grad_a1, grad_b1, grad_a2, grad_b2 = composed_hadamard_gradients(grad_weight, a1, b1, a2, b2, scale)
        return torch.stack((grad_a1, grad_a2)), torch.stack((grad_b1, grad_b2))
    from networks.kernels.triton.hadamard_kernels import gradients_kernel

    check_outside_graphs(grad_weight, a1, b1, a2, b2)
    (rows, columns), rank = grad_weight.shape, b1.shape[0]
    exactness = precision(grad_weight.dtype)
    tile = GRADIENT_TILES[exactness][power_of_2(rank, 16)]
    blocks, tiles = ceil_div(rows, tile.rows), ceil_div(columns, tile.columns)
    in_a_strip = strip_length(blocks, tiles)
    strips = ceil_div(tiles, in_a_strip)
    parts_a = grad_weight.new_empty((strips, 2, rows, rank), dtype=torch.float32)
    parts_b = grad_weight.new_empty((blocks, 2, rank, columns), dtype=torch.float32)
    launch(
        gradients_kernel, (blocks, strips), parts_a,
        grad_weight, a1, b1, a2, b2, parts_a, parts_b, scale, rows, columns, rank, *a1.stride(), *b1.stride(),
        PRECISION=exactness, ROWS=tile.rows, COLUMNS=tile.columns, RANKS=tile.ranks, TILES=in_a_strip, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return parts_a.sum(0), parts_b.sum(0)


def strip_length(blocks: int, tiles: int) -> int:
    """How many of a block's tiles one program takes, a power of two: the fewer programs, the fewer partial sums."""
    length = 1
    while length < 16 and blocks * tiles >= 2 * length * PROGRAMS:
        length *= 2
    return length


def _are_alike(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> bool:
    """Whether both pairs are laid out alike, so that one set of offsets serves both."""
    return all(one.shape == other.shape and one.stride() == other.stride() and one.dim() == 2 for one, other in ((a1, a2), (b1, b2)))


def _result_dtype(a1: Tensor, base: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (a1.dtype if base is None else base.dtype)


def _empty_weight(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    return a1.new_empty((a1.shape[0], b1.shape[1]), dtype=_result_dtype(a1, base, dtype))


def _empty_gradients(grad_weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    empty_a, empty_b = (factor.new_empty((2, *factor.shape), dtype=wide(factor.dtype)) for factor in (a1, b1))
    return empty_a, empty_b


register(
    "hadamard_weight(Tensor a1, Tensor b1, Tensor a2, Tensor b2, float scale, Tensor? base=None, ScalarType? dtype=None) -> Tensor",
    _weight,
    _empty_weight,
)
register(
    "hadamard_gradients(Tensor grad_weight, Tensor a1, Tensor b1, Tensor a2, Tensor b2, float scale) -> (Tensor, Tensor)",
    _gradients,
    _empty_gradients,
)
