"""The kernel of LoKr's first factor against float64, interpreted on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import interpreted
from torch import Tensor

from networks.kernels.triton.machine import ceil_div
from networks.kernels.triton.mixing import block_width, composed_kronecker_mix, kronecker_mix, supports_kronecker_mix

pytest.importorskip("triton")
ERRORS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 4e-3}  # the interpreter cuts bfloat16 off where GPUs round it
few = settings(max_examples=20, deadline=None, derandomize=True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


@few
@given(
    st.integers(1, 128), st.integers(1, 128), st.integers(1, 9), st.integers(1, 70), st.sampled_from(sorted(ERRORS, key=str)), st.booleans()
)
def test_the_blocks_are_mixed(outer: int, inner: int, tokens: int, width: int, dtype: torch.dtype, has_out: bool):
    w1, blocks = random(outer, inner, dtype=dtype), random(tokens, inner, width, dtype=dtype)
    out = random(tokens, outer, width, dtype=dtype) if has_out else None
    mixed = interpreted(kronecker_mix, w1, blocks, out, 0.3)
    exact = 0.3 * w1.double() @ blocks.double() + (0 if out is None else out.double())
    assert mixed.dtype == dtype
    assert error(mixed, exact) < ERRORS[dtype]


def both_results(w1: Tensor, blocks: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return kronecker_mix(w1, blocks, out), out


def test_an_output_is_added_to_in_place_and_rounded_once():
    w1, blocks, out = 0.001 * random(6, 4), random(20, 4, 18).half(), random(20, 6, 18).half()
    mixed, changed = interpreted(both_results, w1, blocks, out)
    assert mixed.equal(changed)
    once = (w1.half().double() @ blocks.double() + out.double()).half()
    assert (mixed == once).float().mean() > 0.995  # the rest are ties within float32's own error


def mixed_by_transposed(w1: Tensor, blocks: Tensor) -> Tensor:
    assert supports_kronecker_mix(w1.T, blocks)
    return kronecker_mix(w1.T, blocks)


def test_the_input_gradient_is_mixed_by_a_transposed_view():
    w1, grad = random(6, 4), random(20, 6, 18)
    assert error(interpreted(mixed_by_transposed, w1, grad), w1.T.double() @ grad.double()) < ERRORS[torch.float32]


@pytest.mark.parametrize("has_out", [False, True])
@pytest.mark.parametrize("dtype", ERRORS)
def test_the_composed_form_is_the_formula(dtype: torch.dtype, has_out: bool):
    w1, blocks, out = random(6, 4), random(20, 4, 18).to(dtype), random(20, 6, 18).to(dtype)
    exact = 0.3 * w1.to(dtype).double() @ blocks.double() + (out.double() if has_out else 0)
    mixed = composed_kronecker_mix(w1, blocks, out if has_out else None, 0.3)
    assert error(mixed, exact) < ERRORS[dtype]
    assert (mixed is out) == has_out


def test_a_kernel_is_offered_where_it_runs():
    w1, blocks = random(6, 4), random(20, 4, 18)
    assert not supports_kronecker_mix(w1, blocks)  # a CPU, not interpreting
    assert interpreted(supports_kronecker_mix, w1, blocks)
    assert not interpreted(supports_kronecker_mix, w1, blocks.double())
    assert not interpreted(supports_kronecker_mix, random(129, 4), blocks)


@given(st.integers(16, 10_000))
def test_programs_share_a_width_with_little_waste(width: int):
    size = block_width(width)
    assert size in (16, 32, 64, 128)
    assert size == 16 or size * ceil_div(width, size) <= 1.125 * width
