"""The identities between factorisations hold, and truncations lose what they say."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from networks.rewriting.algebra import (
    LowRank,
    Spectrum,
    as_hadamard,
    as_kron,
    best_spectrum,
    concatenated,
    dense_spectrum,
    exact_product,
    flat_tucker,
    hadamard_product,
    kron,
    kron_product,
    kron_spectrum,
    narrowed,
    product_spectrum,
    rank_for,
    relative_error,
)

SIDES = st.sampled_from((1, 2, 3, 5, 6, 7, 12, 13))
KERNELS = st.sampled_from(((), (1, 1), (3, 3), (3,), (2, 1, 3)))
RANKS = st.sampled_from((1, 2, 3, 5))
DTYPES = st.sampled_from((torch.float64, torch.float32))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


class Numbers:
    """Random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def product(self, o: int, i: int, kernel: tuple[int, ...], rank: int) -> LowRank:
        return LowRank(self(o, rank), self(rank, i, *kernel))


numbers = st.builds(Numbers, DTYPES)
several = settings(max_examples=60, deadline=None)


def same(value: Tensor, expected: Tensor) -> bool:
    assert value.shape == expected.shape and value.dtype == expected.dtype
    return relative_error(value, expected) < TOLERANCE[expected.dtype]


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS)
def test_a_spectrum_of_a_product_rebuilds_it(make: Numbers, o: int, i: int, kernel: Any, rank: int):
    product = make.product(o, i, kernel, rank)
    spectrum = product_spectrum(product)
    assert spectrum.values.numel() <= min(o, product.down[0].numel(), max(rank, 1))
    assert same(spectrum.low_rank(rank).dense(), product.dense())


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS, RANKS)
def test_a_truncated_product_has_the_error_it_says_and_none_is_nearer(make: Numbers, o: int, i: int, kernel: Any, rank: int, kept: int):
    product = make.product(o, i, kernel, rank)
    spectrum = product_spectrum(product)
    values = torch.linalg.svdvals(product.dense().flatten(1).double())
    best = float((values[kept:].square().sum() / values.square().sum()).sqrt())
    measured = relative_error(spectrum.low_rank(kept).dense(), product.dense())
    assert abs(spectrum.error(kept) - measured) < 20 * TOLERANCE[make.dtype]
    assert abs(measured - best) < 20 * TOLERANCE[make.dtype]


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS)
def test_a_tucker_convolution_is_a_flat_one_of_its_rank(make: Numbers, o: int, i: int, kernel: Any, rank: int):
    core, a, b = make(rank, rank, *kernel), make(rank, o), make(rank, i)
    flat = flat_tucker(core, a, b)
    assert flat.rank == rank
    assert same(flat.dense(), torch.einsum("xy...,xp,yq->pq...", core, a, b))


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS, RANKS)
def test_a_hadamard_product_is_a_product_of_the_product_of_the_ranks(make: Numbers, o: int, i: int, kernel: Any, r1: int, r2: int):
    first, second = make.product(o, i, kernel, r1), make.product(o, i, kernel, r2)
    product = hadamard_product(first, second)
    assert product.rank == r1 * r2
    assert same(product.dense(), first.dense() * second.dense())


@several
@given(numbers, SIDES, SIDES, SIDES, SIDES, KERNELS, st.sampled_from((None, 1, 3)), st.sampled_from((None, 1, 3)))
def test_a_kronecker_product_is_a_product_of_the_product_of_the_ranks(
    make: Numbers, a: int, b: int, c: int, d: int, kernel: Any, r1: int | None, r2: int | None
):
    w1 = make(a, b) if r1 is None else make.product(a, b, (), r1)
    w2 = make(c, d, *kernel) if r2 is None else make.product(c, d, kernel, r2)
    product = kron_product(w1, w2)
    whole = [part.dense() if isinstance(part, LowRank) else part for part in (w1, w2)]
    ranks = [int(torch.linalg.matrix_rank(part.flatten(1).double(), rtol=1e-5)) for part in whole]
    assert product.rank == ranks[0] * ranks[1]
    assert same(product.dense(), kron(*whole))


def test_the_kernel_is_carried_by_the_second_factor():
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5, 3, 2)
    for y in range(3):
        for x in range(2):
            torch.testing.assert_close(kron(w1, w2)[..., y, x], torch.kron(w1, w2[..., y, x].contiguous()))


@several
@given(numbers, SIDES, SIDES, SIDES, SIDES, KERNELS, st.integers(1, 20))
def test_the_best_product_of_a_kronecker_product_needs_no_dense_weight(
    make: Numbers, a: int, b: int, c: int, d: int, kernel: Any, rank: int
):
    w1, w2 = make(a, b), make(c, d, *kernel)
    spectrum = kron_spectrum(dense_spectrum(w1), dense_spectrum(w2), rank=rank)
    values = torch.linalg.svdvals(kron(w1, w2).flatten(1).double())
    best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    measured = relative_error(spectrum.low_rank(rank).dense(), kron(w1, w2))
    assert spectrum.values.numel() <= rank
    assert abs(measured - best) < 20 * TOLERANCE[make.dtype]
    assert abs(spectrum.error(rank) - best) < 20 * TOLERANCE[make.dtype]


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS)
def test_a_product_is_a_kronecker_and_a_hadamard_product_of_its_rank(make: Numbers, o: int, i: int, kernel: Any, rank: int):
    product = make.product(o, i, kernel, rank)
    w1, w2 = as_kron(product)
    assert same(kron(w1, w2.dense()), product.dense())
    first, second = as_hadamard(product)
    assert first.rank == second.rank == rank
    assert same(first.dense() * second.dense(), product.dense())


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS, RANKS)
def test_products_add_up_by_concatenation(make: Numbers, o: int, i: int, kernel: Any, r1: int, r2: int):
    first, second = make.product(o, i, kernel, r1), make.product(o, i, kernel, r2)
    total = concatenated([first, second], [0.7, -1.3])
    assert total.rank == r1 + r2
    assert same(total.dense(), 0.7 * first.dense() - 1.3 * second.dense())


@several
@given(numbers, SIDES, SIDES, KERNELS, RANKS)
def test_no_product_is_wider_than_its_weight(make: Numbers, o: int, i: int, kernel: Any, rank: int):
    wide = make.product(o, i, kernel, 4 * rank)
    product = narrowed(wide)
    assert product.rank <= min(o, product.down[0].numel())
    assert same(product.dense(), wide.dense())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_dense_weight_of_low_rank_is_found_to_have_it(dtype: torch.dtype):
    planted = Numbers(dtype).product(40, 10, (3, 3), 7)
    product = exact_product(planted.dense())
    assert product.rank == 7
    assert same(product.dense(), planted.dense())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_randomised_decomposition_is_within_one_percent_of_the_best(power: float):
    u, v = (torch.linalg.qr(Numbers(torch.float32)(size, 500))[0] for size in (500, 600))
    values = torch.arange(1, 501).float() ** -power
    weight = (u * values) @ v.mT
    for rank in (1, 8, 32):
        best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        spectrum = dense_spectrum(weight, rank)
        measured = relative_error(spectrum.low_rank(rank).dense(), weight)
        assert spectrum.values.numel() < 500
        assert measured < 1.01 * best
        assert abs(spectrum.error(rank) - measured) < 1e-4


def test_a_decomposition_is_the_same_every_time_and_leaves_the_random_state_alone():
    weight, state = torch.randn(300, 400), torch.random.get_rng_state()
    assert torch.equal(dense_spectrum(weight, 4).u, dense_spectrum(weight, 4).u)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_planted_low_rank_is_found_exactly_in_a_large_weight():
    planted = Numbers(torch.float32).product(400, 500, (), 20)
    spectrum, rank = best_spectrum(planted.dense(), max_error=1e-3)
    assert rank == 20
    assert relative_error(spectrum.low_rank(rank).dense(), planted.dense()) < 1e-5


@pytest.mark.parametrize("wanted", [0.9, 0.3, 0.03])
def test_the_lowest_rank_with_an_error_is_chosen(wanted: float):
    weight = Numbers(torch.float64)(300, 280)
    values = torch.linalg.svdvals(weight)
    spectrum, rank = best_spectrum(weight, max_error=wanted)
    assert relative_error(spectrum.low_rank(rank).dense(), weight) <= wanted
    smallest = float((values[rank - 1 :].square().sum() / values.square().sum()).sqrt())
    assert smallest > wanted or smallest > 0.97 * wanted  # randomised: a rank below could just have done


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        ({}, 4),
        ({"rank": 3}, 3),
        ({"rank": 9}, 4),
        ({"max_error": 0.0}, 3),
        ({"max_error": 0.5}, 2),
        ({"max_error": 0.99}, 1),
        ({"max_error": 0.1, "rank": 2}, 2),
        ({"max_error": 0.1, "rest": 10.0}, 4),
    ],
)
def test_a_rank_is_chosen_by_size_or_error(wish: dict[str, Any], kept: int):
    assert rank_for(torch.tensor([2.0, 2.0, 1.0, 0.0]), **wish) == kept


def test_a_weight_of_zeros_has_rank_one_and_no_error():
    assert rank_for(torch.zeros(3), max_error=0.1) == 1
    assert Spectrum(torch.eye(3), torch.zeros(3), torch.eye(3)).error(1) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("wish", [{"rank": 0}, {"rank": -1}, {"max_error": 1.0}, {"max_error": -0.1}, {"max_error": float("nan")}])
def test_impossible_wishes_are_refused(wish: dict[str, Any]):
    with pytest.raises(ValueError, match="must be at least"):
        rank_for(torch.ones(3), **wish)
