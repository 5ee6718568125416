"""Extracted adapters mean what they were extracted from, up to the error they state."""

from typing import Any

import pytest
import torch
from adapter_cases import relative_error
from torch import Tensor, nn

from networks.members import algorithm_of
from networks.rewriting.algebra import kron
from networks.rewriting.extraction import EXTRACTORS, FACTORS, Extracted, extract_loha, extract_lokr, extract_lora

LAYERS = {
    (40, 30): lambda: nn.Linear(30, 40),
    (13, 7): lambda: nn.Linear(7, 13),
    (12, 10, 3, 3): lambda: nn.Conv2d(10, 12, 3),
    (12, 10, 1, 1): lambda: nn.Conv2d(10, 12, 1),
    (12, 10, 3): lambda: nn.Conv1d(10, 12, 3),
    (6, 4, 1, 3, 2): lambda: nn.Conv3d(4, 6, (1, 3, 2)),
}


def change(*shape: int) -> Tensor:
    return 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(4))


def delta_of(found: Extracted, shape: tuple[int, ...]) -> Tensor:
    return algorithm_of("x", found.tensors).from_tensors("x", LAYERS[shape](), found.tensors).delta_weight()


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("wish", [{"rank": 2}, {"max_error": 0.8}, {"rank": 3, "max_error": 0.1}], ids=str)
@pytest.mark.parametrize("algorithm", EXTRACTORS)
def test_an_extracted_adapter_is_as_near_as_it_says(algorithm: str, wish: dict[str, Any], shape: tuple[int, ...]):
    delta = change(*shape)
    found = EXTRACTORS[algorithm](delta, **wish)
    assert algorithm_of("x", found.tensors).title.lower() == algorithm
    assert relative_error(delta_of(found, shape), delta) == pytest.approx(found.error, abs=1e-6)


def test_a_lora_has_the_error_of_the_singular_values_it_leaves_out():
    delta = change(40, 30)
    values = torch.linalg.svdvals(delta)
    assert extract_lora(delta, rank=5).error == pytest.approx(float((values[5:].square().sum() / values.square().sum()).sqrt()), abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (12, 10, 3, 3), (13, 7)])
def test_a_planted_kronecker_product_is_extracted_without_a_rank(shape: tuple[int, ...]):
    w1, w2 = extract_lokr(change(*shape)).tensors["lokr_w1"], extract_lokr(change(*shape)).tensors["lokr_w2"]
    found = extract_lokr(kron(w1, w2))
    assert found.error < 1e-6


def test_a_search_finds_the_split_that_was_planted():
    delta = kron(change(4, 4), change(16, 12))
    found = extract_lokr(delta, max_error=1e-3, factor=None)
    assert found.error < 1e-6
    assert found.tensors["lokr_w1"].shape == (4, 4)


def test_a_search_with_an_error_takes_the_fewest_parameters_that_have_it():
    delta = change(64, 48)
    single = [extract_lokr(delta, max_error=0.9, factor=factor) for factor in FACTORS]
    found = extract_lokr(delta, max_error=0.9, factor=None)
    assert found.error <= 0.9
    assert found.parameters == min(fit.parameters for fit in single if fit.error <= 0.9)


@pytest.mark.parametrize("shape", [(64, 48), (13, 7), (12, 10, 3, 3), (1, 5)])
def test_a_search_with_a_rank_stays_within_the_size_of_that_lora(shape: tuple[int, ...]):
    delta = change(*shape)
    for rank in (1, 4):
        found = extract_lokr(delta, rank=rank, factor=None)
        assert found.parameters <= rank * sum(delta.flatten(1).shape) + 1
        assert found.error <= extract_lora(delta, rank=rank).error + 1e-6, "a LoRA is one of its choices"


def test_a_search_with_both_stays_within_the_size_where_the_error_cannot_be_had():
    delta = change(64, 48)
    found = extract_lokr(delta, rank=3, max_error=0.1, factor=None)
    assert found.parameters <= 3 * (64 + 48) + 1
    assert found.error > 0.1


def test_sizes_must_be_given():
    for extract in (extract_lora, extract_loha, lambda delta: extract_lokr(delta, factor=None)):
        with pytest.raises(ValueError, match="neither rank nor max_error"):
            extract(change(4, 4))


def test_a_change_of_zero_is_extracted_as_zero():
    for extract in EXTRACTORS.values():
        found = extract(torch.zeros(6, 4), rank=2)
        assert found.error == 0.0
