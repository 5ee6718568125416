"""The Triton side of `hadamard`, imported by its first launch: Python's syntax, not its types.

Blocks are masked at every edge. Offsets are 64 bits, for weights of more than 2^31 elements.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def weight_kernel(
    a1: tl.tensor, b1: tl.tensor, a2: tl.tensor, b2: tl.tensor, base: tl.tensor, result: tl.tensor, scale: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, rank: tl.tensor,
    a_row: tl.tensor, a_rank: tl.tensor, b_rank: tl.tensor, b_column: tl.tensor,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of scale * (a1 b1) * (a2 b2) + base: both products stay in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        at_a, in_a = _place(row, ranks, rows, rank, a_row, a_rank)
        at_b, in_b = _place(ranks, column, rank, columns, b_rank, b_column)
        left, right = _operand(a1, at_a, in_a, PRECISION), _operand(b1, at_b, in_b, PRECISION)
        first = tl.dot(left, right, first, input_precision=PRECISION)
        left, right = _operand(a2, at_a, in_a, PRECISION), _operand(b2, at_b, in_b, PRECISION)
        second = tl.dot(left, right, second, input_precision=PRECISION)
    value = first * second * scale
    at, inside = _place(row, column, rows, columns, columns, 1)
    if base is not None:
        value += _block(base, at, inside)
    tl.store(result + at, value.to(result.dtype.element_ty), inside)


@triton.jit
def gradients_kernel(
    grad: tl.tensor, a1: tl.tensor, b1: tl.tensor, a2: tl.tensor, b2: tl.tensor, parts_a: tl.tensor, parts_b: tl.tensor, scale: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, rank: tl.tensor,
    a_row: tl.tensor, a_rank: tl.tensor, b_rank: tl.tensor, b_column: tl.tensor,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """A strip of TILES tiles in a block of rows: its share of a's gradients (strips, 2, rows, rank) and b's (blocks, 2, rank, columns)."""
    block, strip = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    at_a, in_a = _place(row, ranks, rows, rank, a_row, a_rank)
    left1, left2 = _operand(a1, at_a, in_a, PRECISION), _operand(a2, at_a, in_a, PRECISION)
    grad_a1 = tl.zeros((ROWS, RANKS), tl.float32)
    grad_a2 = tl.zeros((ROWS, RANKS), tl.float32)
    parts_b += block.to(tl.int64) * 2 * rank * columns
    for tile in range(TILES):
        column = (strip * TILES + tile) * COLUMNS + tl.arange(0, COLUMNS)
        at_b, in_b = _place(ranks, column, rank, columns, b_rank, b_column)
        right1, right2 = _operand(b1, at_b, in_b, PRECISION), _operand(b2, at_b, in_b, PRECISION)
        at, inside = _place(row, column, rows, columns, columns, 1)
        change = _block(grad, at, inside) * scale
        at_part, in_part = _place(ranks, column, rank, columns, columns, 1)
        share = _rounded(change * tl.dot(left2, right2, input_precision=PRECISION), PRECISION)
        grad_a1 = tl.dot(share, tl.trans(right1), grad_a1, input_precision=PRECISION)
        tl.store(parts_b + at_part, tl.dot(tl.trans(left1), share, input_precision=PRECISION), in_part)
        share = _rounded(change * tl.dot(left1, right1, input_precision=PRECISION), PRECISION)
        grad_a2 = tl.dot(share, tl.trans(right2), grad_a2, input_precision=PRECISION)
        tl.store(parts_b + rank * columns + at_part, tl.dot(tl.trans(left2), share, input_precision=PRECISION), in_part)
    at, inside = _place(row, ranks, rows, rank, rank, 1)
    parts_a += strip.to(tl.int64) * 2 * rows * rank
    tl.store(parts_a + at, grad_a1, inside)
    tl.store(parts_a + rows * rank + at, grad_a2, inside)


@triton.jit
def _place(
    rows: tl.tensor, columns: tl.tensor, row_count: tl.tensor, column_count: tl.tensor, row_stride: tl.tensor, column_stride: tl.tensor
) -> tl.tuple:
    """Offsets of a block of a matrix, and which of them lie inside it."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride, inside


@triton.jit
def _block(pointer: tl.tensor, offsets: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """A block as float32, zero outside."""
    return tl.load(pointer + offsets, inside, 0.0).to(tl.float32)


@triton.jit
def _operand(pointer: tl.tensor, offsets: tl.tensor, inside: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """A block as `tl.dot` multiplies it. Half precision is within TF32."""
    block = _block(pointer, offsets, inside)
    return _rounded(block, PRECISION) if pointer.dtype.element_ty == tl.float32 else block


@triton.jit
def _rounded(x: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """float32 rounded to TF32: tensor cores would cut the last 13 bits off, and four such factors make a delta small by a thousandth."""
    if PRECISION == "ieee":
        return x
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN's bits would wrap around to zero
