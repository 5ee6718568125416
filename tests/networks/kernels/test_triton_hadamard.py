"""LoHa's kernels against float64, interpreted on the CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import interpreted
from torch import Tensor

from networks.kernels.triton import hadamard
from networks.kernels.triton.hadamard import (
    composed_hadamard_gradients,
    composed_hadamard_weight,
    hadamard_gradients,
    hadamard_weight,
    strip_length,
    supports_hadamard_gradients,
    supports_hadamard_weight,
)

pytest.importorskip("triton")
ERRORS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 4e-3}  # the interpreter cuts bfloat16 off where GPUs round it
GRADIENT_ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}  # TF32, where the weight's gradient is half precision
few = settings(max_examples=12, deadline=None, derandomize=True)
sides, ranks, dtypes = st.integers(1, 150), st.integers(4, 64), st.sampled_from(sorted(ERRORS, key=str))


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + rank)
    shapes = (rows, rank), (rank, columns), (rows, rank), (rank, columns)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


def exact_weight(scale: float, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return scale * (a1.double() @ b1.double()) * (a2.double() @ b2.double())


def exact_gradients(grad: Tensor, scale: float, *stored: Tensor) -> tuple[Tensor, ...]:
    leaves = [factor.double().requires_grad_() for factor in stored]
    return torch.autograd.grad(exact_weight(scale, *leaves), leaves, grad.double())


@few
@given(sides, sides, ranks, dtypes, st.booleans())
def test_the_weight_is_the_formula(rows: int, columns: int, rank: int, dtype: torch.dtype, has_base: bool):
    stored = factors(rows, columns, rank, dtype)
    base = torch.randn(rows, columns).to(dtype) if has_base else None
    weight = interpreted(hadamard_weight, *stored, 0.3, base)
    exact = exact_weight(0.3, *stored) + (0 if base is None else base.double())
    assert weight.dtype == dtype
    assert error(weight, exact) < ERRORS[dtype]


def test_a_base_is_added_before_the_one_rounding():
    stored, base = factors(70, 90, 8, torch.float16), torch.randn(70, 90).half()
    weight = interpreted(hadamard_weight, *stored, 0.001, base)
    once = (exact_weight(0.001, *stored) + base.double()).half()
    assert (weight == once).float().mean() > 0.995  # the rest are ties within float32's own error


def test_float32_factors_make_a_weight_of_another_dtype():
    stored = factors(20, 30, 5)
    weight = interpreted(hadamard_weight, *stored, 1.0, None, torch.float16)
    assert weight.dtype == torch.float16
    assert error(weight, exact_weight(1.0, *stored)) < 2 * ERRORS[torch.float16]  # the factors' TF32, and the rounding


def test_float32_factors_are_rounded_to_tf32_not_cut_off():
    stored = factors(60, 70, 8)
    weight, exact = interpreted(hadamard_weight, *stored, 1.0, None, torch.float16).double(), exact_weight(1.0, *stored)
    assert float((weight * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=1e-4)


def test_a_nan_stays_one():
    stored = factors(20, 30, 5)
    stored[0][7, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    weight = interpreted(hadamard_weight, *stored, 1.0, None, torch.float16)
    assert weight.isnan().any(1).nonzero().tolist() == [[7]]


def test_more_ranks_than_a_step_of_the_sum_holds():
    stored = factors(40, 50, 100)
    assert error(interpreted(hadamard_weight, *stored), exact_weight(1.0, *stored)) < ERRORS[torch.float32]


def transposed_weight_and_gradients(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, grad: Tensor) -> Any:
    turned = a1.T.contiguous().T, b1, a2.T.contiguous().T, b2  # as the factors beside a Tucker core are stored
    assert turned[0].stride() == (1, a1.shape[0])
    assert supports_hadamard_weight(*turned)
    return hadamard_weight(*turned), hadamard_gradients(grad, *turned)


def test_factors_may_be_stored_transposed():
    stored, grad = factors(40, 30, 5), torch.randn(40, 30)
    weight, gradients = interpreted(transposed_weight_and_gradients, *stored, grad)
    assert error(weight, exact_weight(1.0, *stored)) < ERRORS[torch.float32]
    for gradient, exact in zip(gradients, exact_gradients(grad, 1.0, *stored), strict=True):
        assert error(gradient, exact) < ERRORS[torch.float32]


@few
@given(sides, sides, ranks, dtypes)
def test_the_gradients_are_the_formulas(rows: int, columns: int, rank: int, dtype: torch.dtype):
    stored, grad = factors(rows, columns, rank, dtype), torch.randn(rows, columns).to(dtype)
    gradients = interpreted(hadamard_gradients, grad, *stored, 0.3)
    for gradient, factor, exact in zip(gradients, stored, exact_gradients(grad, 0.3, *stored), strict=True):
        assert gradient.dtype == torch.float32
        assert gradient.shape == factor.shape
        assert error(gradient, exact) < GRADIENT_ERRORS[dtype]


def gradients_in_strips(*tensors: Tensor) -> Any:
    """As if the weight were so large that two programs had more than enough to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard, "PROGRAMS", 2)
        assert strip_length(blocks=2, tiles=5) == 4
        return hadamard_gradients(*tensors)


def test_the_gradients_of_a_large_weight_are_summed_in_strips():
    stored, grad = factors(120, 150, 4), torch.randn(120, 150)  # 2 blocks of 5 tiles
    for gradient, exact in zip(interpreted(gradients_in_strips, grad, *stored), exact_gradients(grad, 1.0, *stored), strict=True):
        assert error(gradient, exact) < ERRORS[torch.float32]


@pytest.mark.parametrize("dtype", ERRORS)
def test_the_composed_forms_are_the_formulas(dtype: torch.dtype):
    stored, grad, base = factors(30, 40, 6, dtype), torch.randn(30, 40).to(dtype), torch.randn(30, 40).to(dtype)
    weight = composed_hadamard_weight(*stored, 0.3, base)
    assert error(weight, exact_weight(0.3, *stored) + base.double()) < ERRORS[dtype]
    for gradient, exact in zip(composed_hadamard_gradients(grad, *stored, 0.3), exact_gradients(grad, 0.3, *stored), strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, exact) < ERRORS[torch.float32]


def supported(*stored: Tensor, base: Tensor | None = None) -> tuple[bool, bool]:
    grad = torch.zeros(stored[0].shape[0], stored[1].shape[1])
    return supports_hadamard_weight(*stored, base), supports_hadamard_gradients(grad, *stored)


def test_kernels_are_offered_where_they_run():
    small = factors(20, 30, 4)
    assert supported(*small) == (False, False)  # a CPU, not interpreting
    assert interpreted(supported, *small) == (True, True)
    assert interpreted(supported, *factors(20, 30, 65)) == (True, False)
    assert interpreted(supported, *(factor.double() for factor in small)) == (False, False)
    assert interpreted(supported, *factors(20, 30, 4)[:2], *factors(20, 30, 5)[:2]) == (False, False)
    assert interpreted(supported, *small, base=torch.zeros(30, 20).T) == (False, True)
