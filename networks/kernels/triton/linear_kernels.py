"""The Triton side of `linear`, imported by its first launch: Python's syntax, not its types.

Blocks are masked at every edge. Row offsets are 64 bits.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x: tl.tensor, weights: tl.tuple, biases: tl.tuple, hiddens: tl.tuple, ups: tl.tuple, results: tl.tuple, scale: tl.tensor,
    tokens: tl.tensor, outs: tl.tuple, inner: tl.tensor, rank: tl.tensor,
    x_row: tl.tensor, weight_row: tl.tensor, weight_column: tl.tensor, hidden_row: tl.tensor, up_row: tl.tensor, up_column: tl.tensor,
    LAYERS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the output of one of the layers, which the second program axis counts; narrow layers have programs without a tile."""
    for layer in tl.static_range(LAYERS):
        if tl.program_id(1) == layer:
            out = outs[layer]
            if tl.program_id(0) < tl.cdiv(tokens, ROWS) * tl.cdiv(out, COLUMNS):
                row, column = _tile(tokens, out, ROWS, COLUMNS)
                total = tl.zeros((ROWS, COLUMNS), tl.float32)
                total = _add_product(
                    total, hiddens[layer], ups[layer], row, column, tokens, out, rank, hidden_row, up_row, up_column,
                    x.dtype.element_ty, PRECISION, RANKS,
                ) * scale  # fmt: skip
                total = _add_product(
                    total, x, weights[layer], row, column, tokens, out, inner, x_row, weight_row, weight_column,
                    x.dtype.element_ty, PRECISION, DEPTH,
                )  # fmt: skip
                if biases[layer] is not None:
                    total += tl.load(biases[layer] + column, column < out, 0.0).to(tl.float32)[None, :]
                result = results[layer]
                inside = (row[:, None] < tokens) & (column[None, :] < out)
                tl.store(result + row[:, None].to(tl.int64) * out + column[None, :], total.to(result.dtype.element_ty), inside)


@triton.jit
def _tile(tokens: tl.tensor, out: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tuple:
    """Rows and columns of this program: down bands of eight tiles, so that programs at work together share rows and columns in L2."""
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(out, COLUMNS)
    tile = tl.program_id(0)
    band = tile // (8 * across)
    height = min(down - 8 * band, 8)
    place = tile % (8 * across)
    return (8 * band + place % height) * ROWS + tl.arange(0, ROWS), (place // height) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _add_product(
    total: tl.tensor, left: tl.tensor, right: tl.tensor, row: tl.tensor, column: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, depth: tl.tensor, left_row: tl.tensor, right_row: tl.tensor, right_column: tl.tensor,
    dtype: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """total + left (rows, depth) @ right (columns, depth)^T for one tile, the operands in `dtype`."""
    left_rows = left + row[:, None].to(tl.int64) * left_row
    right_rows = right + column[None, :].to(tl.int64) * right_row
    for start in range(0, depth, DEPTH):
        step = start + tl.arange(0, DEPTH)
        a = tl.load(left_rows + step[None, :], (row[:, None] < rows) & (step[None, :] < depth), 0.0)
        b = tl.load(right_rows + step[:, None] * right_column, (column[None, :] < columns) & (step[:, None] < depth), 0.0)
        total = tl.dot(a.to(dtype), b.to(dtype), total, input_precision=PRECISION)
    return total
