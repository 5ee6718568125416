"""The Triton side of `mixing`, imported by its first launch: Python's syntax, not its types.

Blocks are masked at every edge. Token offsets are 64 bits.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    w1: tl.tensor, blocks: tl.tensor, result: tl.tensor, scale: tl.tensor, tokens: tl.tensor, outer: tl.tensor, inner: tl.tensor,
    width: tl.tensor, w1_row: tl.tensor, w1_column: tl.tensor,
    ACCUMULATES: tl.constexpr, PRECISION: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """scale * w1 @ blocks for TOKENS tokens and WIDTH columns: one product (OUTER, INNER) by (INNER, TOKENS * WIDTH)."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = (token[:, None] < tokens) & (column[None, :] < width)
    row = tl.arange(0, OUTER)
    total = tl.zeros((OUTER, TOKENS * WIDTH), tl.float32)
    for start in range(0, inner, INNER):
        step = start + tl.arange(0, INNER)
        mixer = tl.load(w1 + row[:, None] * w1_row + step[None, :] * w1_column, (row[:, None] < outer) & (step[None, :] < inner), 0.0)
        places = (token[:, None] * inner * width + column[None, :])[None, :, :] + (step * width)[:, None, None]
        block = tl.load(blocks + places, exists[None, :, :] & (step < inner)[:, None, None], 0.0)
        block = tl.reshape(block, (INNER, TOKENS * WIDTH))
        total = tl.dot(mixer.to(block.dtype), block, total, input_precision=PRECISION)
    value = tl.reshape(total * scale, (OUTER, TOKENS, WIDTH))
    places = (token[:, None] * outer * width + column[None, :])[None, :, :] + (row * width)[:, None, None]
    inside = exists[None, :, :] & (row < outer)[:, None, None]
    if ACCUMULATES:
        value += tl.load(result + places, inside, 0.0).to(tl.float32)
    tl.store(result + places, value.to(result.dtype.element_ty), inside)
