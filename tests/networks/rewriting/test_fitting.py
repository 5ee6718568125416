"""Fits find what was planted, never get worse, and say how far off they are."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from networks.rewriting.algebra import LowRank, hadamard_product, kron, product_spectrum, relative_error
from networks.rewriting.fitting import nearest_hadamard, nearest_kron, rearranged

SIDES = st.sampled_from((1, 2, 3, 4, 7))
KERNELS = st.sampled_from(((), (1, 1), (3, 3), (3,), (2, 1, 3)))
several = settings(max_examples=40, deadline=None)


def numbers(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product(o: int, i: int, rank: int, seed: int = 5) -> LowRank:
    return LowRank(numbers(o, rank, seed=seed), numbers(rank, i, seed=seed + 1))


def falls(errors: tuple[float, ...]) -> bool:
    return all(later < earlier for earlier, later in itertools.pairwise(errors))


@several
@given(SIDES, SIDES, SIDES, SIDES, KERNELS)
def test_a_planted_kronecker_product_is_found(a: int, b: int, c: int, d: int, kernel: Any):
    weight = kron(numbers(a, b), numbers(c, d, *kernel, seed=6))
    fit = nearest_kron(weight, a, b)
    assert fit.error < 1e-12
    assert relative_error(fit.dense(), weight) < 1e-12
    narrow = nearest_kron(weight.float(), a, b)
    assert narrow.error < 1e-6
    assert relative_error(narrow.dense(), weight.float()) < 1e-6


@several
@given(SIDES, SIDES, SIDES, SIDES, KERNELS)
def test_the_nearest_kronecker_product_has_the_predicted_error(a: int, b: int, c: int, d: int, kernel: Any):
    weight = numbers(a * c, b * d, *kernel)
    values = torch.linalg.svdvals(rearranged(weight, a, b))
    fit = nearest_kron(weight, a, b)
    predicted = float((1 - values[0].square() / values.square().sum()).clamp_min(0).sqrt())
    assert abs(fit.error - predicted) < 1e-7
    assert abs(fit.error - relative_error(fit.dense(), weight)) < 1e-12


def test_the_rearranged_weight_is_an_outer_product_where_the_weight_is_a_kronecker_product():
    w1, w2 = numbers(3, 2), numbers(4, 5, 3, 3, seed=6)
    torch.testing.assert_close(rearranged(kron(w1, w2), 3, 2), torch.outer(w1.flatten(), w2.flatten()))


@several
@given(SIDES, SIDES, st.sampled_from((5, 8)), st.sampled_from((6, 9)), KERNELS, st.sampled_from((1, 2)))
def test_a_second_factor_of_a_rank_is_fitted_with_a_falling_error(a: int, b: int, c: int, d: int, kernel: Any, rank: int):
    weight = numbers(a * c, b * d, *kernel)
    fit = nearest_kron(weight, a, b, rank=rank)
    assert isinstance(fit.w2, LowRank)
    assert fit.w2.rank == rank
    assert falls(fit.errors)
    assert abs(fit.error - relative_error(fit.dense(), weight)) < 1e-12
    assert fit.error >= nearest_kron(weight, a, b).error


def test_the_alternation_is_nearer_than_truncating_the_nearest_product():
    weight = numbers(48, 60)
    whole = nearest_kron(weight, 4, 5)
    assert isinstance(whole.w2, Tensor)
    cut = product_spectrum(LowRank(whole.w2, torch.eye(12, dtype=weight.dtype))).low_rank(2)
    assert nearest_kron(weight, 4, 5, rank=2).error < relative_error(kron(whole.w1, cut.dense()), weight)


def test_a_planted_second_factor_of_a_rank_is_found():
    weight = kron(numbers(4, 3), product(20, 30, 2).dense())
    fit = nearest_kron(weight, 4, 3, rank=2)
    assert fit.error < 1e-12
    assert fit.errors[0] < 1e-12, "and at once"


@pytest.mark.parametrize("wanted", [0.999, 0.99, 0.985])
def test_an_error_chooses_the_rank_of_the_second_factor(wanted: float):
    weight = numbers(40, 60)
    fit = nearest_kron(weight, 2, 2, max_error=wanted)
    assert isinstance(fit.w2, LowRank)
    assert fit.error <= wanted


def test_a_second_factor_stays_whole_where_a_rank_would_not_make_it_smaller():
    weight = numbers(40, 60)
    assert isinstance(nearest_kron(weight, 4, 4, rank=7).w2, Tensor)
    assert isinstance(nearest_kron(weight, 4, 4, max_error=0.1).w2, Tensor), "no rank is near enough"
    assert isinstance(nearest_kron(weight, 4, 4, rank=5).w2, LowRank)


def test_both_factors_are_of_the_same_size():
    fit = nearest_kron(1e-4 * numbers(40, 60), 4, 4)
    assert isinstance(fit.w2, Tensor)
    assert float(fit.w1.square().mean() / fit.w2.square().mean()) == pytest.approx(1)


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"\[40, 60\] is no Kronecker product with a first factor of 3 x 4"):
        nearest_kron(numbers(40, 60), 3, 4)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_planted_hadamard_product_is_found(rank: int):
    weight = hadamard_product(product(30, 24, rank), product(30, 24, rank, seed=9)).dense()
    fit = nearest_hadamard(weight, rank, starts=6, sweeps=200)
    assert fit.error < 1e-6
    assert relative_error(fit.dense(), weight) < 1e-6


@settings(max_examples=15, deadline=None)
@given(st.sampled_from((1, 5, 8)), st.sampled_from((1, 6, 9)), KERNELS, st.sampled_from((1, 2, 3)))
def test_a_hadamard_fit_falls_and_says_its_error(o: int, i: int, kernel: Any, rank: int):
    weight = numbers(o, i, *kernel)
    fit = nearest_hadamard(weight, rank, starts=2)
    assert falls(fit.errors)
    assert fit.first.rank == fit.second.rank == rank
    assert fit.dense().shape == weight.shape
    assert abs(fit.error - relative_error(fit.dense(), weight)) < 1e-9


def test_a_hadamard_fit_is_never_further_than_the_best_product_of_its_rank():
    weight = numbers(30, 24)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 2, 4, 8):
        best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        assert nearest_hadamard(weight, rank, starts=1).error <= best + 1e-9


def test_changes_of_zero_are_fitted_by_zeros():
    weight = torch.zeros(6, 8)
    assert nearest_kron(weight, 2, 2).error == 0.0
    assert nearest_kron(weight, 2, 2, rank=1).error == 0.0
    assert nearest_hadamard(weight, 2).error == 0.0
    assert not nearest_hadamard(weight, 2).dense().any()
