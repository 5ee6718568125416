"""Adapters turned into other adapters change their layer as before, or are off by what is said."""

from typing import Any

import pytest
import torch
from adapter_cases import KINDS, Case, filled, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.base import Adapter
from networks.difference import Difference
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.rewriting.conversion import as_lora, flat, resized, summed
from networks.rewriting.factors import parameters
from networks.rewriting.fitting import nearest_hadamard

KERNELS = ((), (1, 1), (3, 3), (3,), (2, 1, 3))


def best_error(delta: Tensor, rank: int) -> float:
    """The smallest error that a LoRA of the rank can have."""
    values = torch.linalg.svdvals(delta.detach().flatten(1).double())
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


def made(algorithm: type[Adapter], layer: nn.Module, rank: int = 4, seed: int = 0, **arguments: object) -> Adapter:
    torch.manual_seed(seed)
    adapter = algorithm.fresh("lora_unet_x", layer, rank, 1.5, algorithm.Arguments(**arguments))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name != "dora_scale":
                parameter.normal_(std=0.3)
    return adapter


# As LoRA


def test_as_lora_it_changes_the_layer_alike(case: Case):
    adapter = filled(case.adapter)
    lora, error = as_lora(adapter)
    assert (lora.name, lora.layer) == (adapter.name, adapter.layer)
    assert relative_error(lora.delta_weight(), adapter.delta_weight()) < 2e-6
    assert error < 2e-6
    assert lora.dora_scale is None and lora.scalar is None
    assert lora.rank <= min(adapter.shape.out, adapter.shape.fan_in)


@pytest.mark.parametrize("rank", [1, 3])
def test_as_lora_of_a_rank_it_is_the_nearest_there_is(case: Case, rank: int):
    adapter = filled(case.adapter)
    lora, error = as_lora(adapter, rank=rank)
    assert lora.rank <= rank
    assert relative_error(lora.delta_weight(), adapter.delta_weight()) == pytest.approx(error, abs=2e-6)
    assert error == pytest.approx(best_error(adapter.delta_weight(), rank), abs=2e-5)


def test_as_lora_with_an_error_it_has_the_lowest_rank_for_it(case: Case):
    adapter = filled(case.adapter)
    lora, error = as_lora(adapter, max_error=0.3)
    assert relative_error(lora.delta_weight(), adapter.delta_weight()) < 0.3
    assert error < 0.3
    assert lora.rank == 1 or best_error(adapter.delta_weight(), lora.rank - 1) > 0.3


def test_exact_ranks_are_r_squared_and_that_of_w1_times_r():
    loha, lokr = made(LoHa, nn.Linear(30, 40)), made(LoKr, nn.Linear(30, 40), factor=3)
    assert isinstance(lokr, LoKr) and (lokr.split.a, lokr.split.b) == (2, 3)
    assert as_lora(loha)[0].rank == 4 * 4
    assert as_lora(lokr)[0].rank == 2 * 4


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((LoRA, LoHa, LoKr)), st.sampled_from((1, 2, 7, 12, 13)), st.sampled_from((1, 3, 7, 8)), st.sampled_from(KERNELS),
    st.sampled_from((1, 3)),
)  # fmt: skip
def test_as_lora_of_any_shape_it_changes_the_layer_alike(algorithm: type[Adapter], out: int, inner: int, kernel: Any, rank: int):
    convolutions = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    layer = convolutions[len(kernel)](inner, out, kernel) if kernel else nn.Linear(inner, out)
    adapter = made(algorithm, layer, rank, use_tucker=len(kernel) == 2)
    for other in (as_lora(adapter)[0], flat(adapter), as_lora(flat(adapter))[0]):
        assert relative_error(other.delta_weight(), adapter.delta_weight()) < 1e-6


def test_dora_needs_its_base_weight():
    layer = nn.Linear(6, 8)
    adapter = made(LoRA, layer, dora_wd=True)
    lora, error = as_lora(adapter, rank=3)
    assert relative_error(lora.delta_weight(), adapter.delta_weight()) == pytest.approx(error, abs=1e-6)
    layer.to("meta")
    with pytest.raises(ValueError, match="lora_unet_x: DoRA rescales the base weight, .* not loaded; give the base model"):
        as_lora(adapter, rank=3)


def test_a_whole_difference_is_decomposed():
    diff = torch.randn(8, 2) @ torch.randn(2, 6)
    lora, error = as_lora(Difference.from_tensors("x", nn.Linear(6, 8), {"diff": diff}))
    assert lora.rank == 2
    assert error < 1e-6
    torch.testing.assert_close(lora.delta_weight(), diff)


@pytest.mark.parametrize(
    ("layer", "tensors", "what"),
    [
        (nn.Linear(6, 8), {"diff_b": torch.ones(8)}, "changes the bias"),
        (nn.LayerNorm(8), {"w_norm": torch.ones(8)}, "is the change of a norm"),
    ],
)
def test_what_no_lora_can_hold_is_refused(layer: nn.Module, tensors: dict[str, Tensor], what: str):
    with pytest.raises(ValueError, match=f"x: {what}"):
        as_lora(Difference.from_tensors("x", layer, tensors))


# Flat


def test_a_flat_adapter_changes_the_layer_alike_at_the_same_rank(case: Case):
    adapter = filled(case.adapter)
    even = flat(adapter)
    assert type(even) is type(adapter)
    assert (even.rank, float(even.alpha)) == (adapter.rank, float(adapter.alpha))
    assert not {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"} & set(even.file_tensors())
    assert relative_error(even.delta_weight(), adapter.delta_weight()) < 1e-6


# Resized


def test_a_resized_adapter_keeps_its_promise(case: Case):
    adapter = filled(case.adapter)
    smaller, error = resized(adapter, rank=1)
    assert type(smaller) is type(adapter)
    assert smaller.rank == 1 or smaller is adapter  # a whole w2 can be smaller than one of rank 1
    assert relative_error(smaller.direction(), adapter.direction()) == pytest.approx(error, abs=2e-6)
    assert ("dora_scale" in smaller.file_tensors()) == ("dora_scale" in adapter.file_tensors())


def test_an_adapter_resized_to_an_error_has_it(case: Case):
    adapter = filled(case.adapter)
    smaller, error = resized(adapter, max_error=0.5)
    assert error <= 0.5
    assert relative_error(smaller.direction(), adapter.direction()) == pytest.approx(error, abs=2e-6)


def test_a_resized_lokr_is_the_nearest_with_its_first_factor():
    adapter = made(LoKr, nn.Linear(60, 40), rank=8, factor=4)
    assert isinstance(adapter, LoKr)
    _, w2 = adapter.whole_factors()
    smaller, error = resized(adapter, rank=2)
    assert error == pytest.approx(best_error(w2, 2), abs=1e-6)
    assert smaller.rank == 2
    torch.testing.assert_close(smaller.file_tensors()["lokr_w1"], adapter.file_tensors()["lokr_w1"])


def test_a_loha_is_resized_from_its_own_factors():
    adapter = made(LoHa, nn.Linear(60, 40), rank=8)
    _, error = resized(adapter, rank=6)
    delta = adapter.direction().detach()
    assert error < nearest_hadamard(delta, 6).error
    assert error < best_error(delta, 12), "a LoRA of the same size is further off"


def test_nothing_is_done_where_an_adapter_is_small_enough(case: Case):
    adapter = filled(case.adapter)
    whole = "lokr_w2" in adapter.file_tensors()
    assert resized(adapter, rank=1000 if whole else adapter.rank) == (adapter, 0.0)


@pytest.mark.parametrize(("algorithm", "arguments"), [(LoRA, {}), (LoKr, {"factor": 4})], ids=str)
def test_a_tucker_core_is_not_made_larger_for_an_error(algorithm: type[Adapter], arguments: dict[str, Any]):
    adapter = made(algorithm, nn.Conv2d(64, 64, 3), rank=4, use_tucker=True, **arguments)
    smaller, _ = resized(adapter, max_error=0.5)
    assert parameters(smaller.file_tensors()) <= parameters(adapter.file_tensors())
    assert resized(adapter, rank=3)[0].rank == 3


def test_a_new_size_must_be_given():
    adapter = made(LoRA, nn.Linear(6, 8))
    with pytest.raises(ValueError, match="neither rank nor max_error"):
        resized(adapter)
    with pytest.raises(ValueError, match="a difference has no rank to lower; as a LoRA it has"):
        resized(Difference.from_tensors("x", nn.Linear(6, 8), {"diff": torch.ones(8, 6)}), rank=2)


# Sums


def total(adapters: list[Adapter], strengths: list[float]) -> Tensor:
    changes = [adapter.delta_weight() * strength for adapter, strength in zip(adapters, strengths, strict=True)]
    return torch.stack(changes).sum(0)


@pytest.mark.parametrize("kind", ["linear", "conv3x3", "conv1d"])
def test_a_sum_changes_the_layer_as_its_parts_together(kind: str):
    layer = KINDS[kind].make()
    adapters = [made(algorithm, layer, rank=2, seed=n) for n, algorithm in enumerate((LoRA, LoHa, LoKr, LoRA))]
    strengths = [0.7, -1.2, 0.5, 1.0]
    one = summed(adapters, strengths)
    assert isinstance(one, LoRA)
    assert relative_error(one.delta_weight(), total(adapters, strengths)) < 1e-6


@pytest.mark.parametrize("ranks", [(2, 2), (2, 50), (50, 50), (12, 12)])
def test_lokrs_with_one_first_factor_stay_a_lokr(ranks: tuple[int, int]):
    layer = nn.Linear(60, 80)
    adapters = [made(LoKr, layer, rank=rank, seed=rank + n, factor=4) for n, rank in enumerate(ranks)]
    first, second = adapters
    assert isinstance(first, LoKr) and isinstance(second, LoKr) and first.lokr_w1 is not None and second.lokr_w1 is not None
    second.lokr_w1.data.copy_(first.lokr_w1)
    one = summed(adapters, [0.5, 2.0])
    assert isinstance(one, LoKr)
    assert relative_error(one.delta_weight(), total(adapters, [0.5, 2.0])) < 1e-6
    assert parameters(one.file_tensors()) <= sum(parameters(adapter.file_tensors()) for adapter in adapters)


def test_one_adapter_keeps_its_algorithm_and_takes_up_its_strength(case: Case):
    adapter = filled(case.adapter)
    one = summed([adapter], [-0.5])
    assert type(one) is (type(adapter) if adapter.dora_scale is None else Difference)
    assert relative_error(one.delta_weight(), -0.5 * adapter.delta_weight()) < 1e-6


def test_with_a_difference_the_sum_is_a_difference():
    layer = nn.Linear(6, 8)
    tensors = {"diff": torch.randn(8, 6), "diff_b": torch.randn(8)}
    adapters = [made(LoHa, layer), Difference.from_tensors("x", layer, tensors), made(LoRA, layer, dora_wd=True)]
    one = summed(adapters, [2.0, 0.5, 1.0])
    assert isinstance(one, Difference)
    torch.testing.assert_close(one.delta_weight(), total(adapters, [2.0, 0.5, 1.0]))
    torch.testing.assert_close(one.delta_bias(), 0.5 * tensors["diff_b"])


def test_differences_of_a_norm_add_up():
    layer = nn.LayerNorm(8)
    adapters: list[Adapter] = [
        Difference.from_tensors("x", layer, {"w_norm": torch.randn(8), "b_norm": torch.randn(8)}),
        Difference.from_tensors("x", layer, {"b_norm": torch.randn(8)}),
    ]
    one = summed(adapters, [2.0, 0.5])
    assert set(one.file_tensors()) == {"w_norm", "b_norm"}
    torch.testing.assert_close(one.delta_weight(), total(adapters, [2.0, 0.5]))


def test_adapters_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"different shapes: \[8, 6\], \[8, 7\]"):
        summed([made(LoRA, nn.Linear(6, 8)), made(LoRA, nn.Linear(7, 8))], [1.0, 1.0])
    with pytest.raises(ValueError, match="no adapters"):
        summed([], [])
    dora = made(LoRA, nn.Linear(6, 8), dora_wd=True)
    dora.layer.to("meta")
    with pytest.raises(ValueError, match="DoRA rescales the base weight"):
        summed([dora, made(LoRA, nn.Linear(6, 8))], [1.0, 1.0])
