"""What is particular to LoRA, LoHa and LoKr: formulas in float64, splits, initial values, rules."""

import math

import pytest
import torch
from adapter_cases import filled, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks.loha import LoHa
from networks.lokr import LoKr, LoKrArguments, factorise
from networks.lora import LoRA
from networks.selection import NetworkArguments


def lokr(layer: nn.Module, rank: int, alpha: float = 1.0, factor: int = -1) -> LoKr:
    return LoKr.fresh("lora_unet_x", layer, rank, alpha, LoKrArguments(factor=factor))


def test_lora_is_alpha_over_rank_times_up_times_down():
    adapter = filled(LoRA("x", nn.Conv2d(5, 6, 3), rank=4, alpha=2))
    up, down = adapter.lora_up.weight.double(), adapter.lora_down.weight.double()
    expected = 0.5 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    assert relative_error(adapter.delta_weight(), expected) < 1e-6


def test_loha_is_the_product_of_two_products():
    adapter = filled(LoHa("x", nn.Linear(5, 6), rank=4, alpha=2))
    a, b, c, d = (parameter.double() for parameter in adapter.parameters())
    assert relative_error(adapter.delta_weight(), 0.5 * (a @ b) * (c @ d)) < 1e-6


@pytest.mark.parametrize("rank", [2, 100])
def test_lokr_is_the_kronecker_product(rank: int):
    adapter = filled(lokr(nn.Linear(24, 32), rank))
    tensors = {name: value.double() for name, value in adapter.named_parameters()}
    w2 = tensors["lokr_w2"] if rank == 100 else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    assert relative_error(adapter.delta_weight(), adapter.scale * torch.kron(tensors["lokr_w1"], w2)) < 1e-6


def test_lokr_of_a_convolution_is_a_kronecker_product_at_every_kernel_position():
    adapter = filled(lokr(nn.Conv2d(12, 8, 3), 100))
    assert adapter.lokr_w1 is not None and adapter.lokr_w2 is not None
    for k in range(3):
        expected = torch.kron(adapter.lokr_w1, adapter.lokr_w2[:, :, k, 1])
        torch.testing.assert_close(adapter.delta_weight()[:, :, k, 1], expected)


def test_initial_values_have_the_spread_of_the_references():
    torch.manual_seed(0)
    layer = nn.Linear(256, 256)
    arguments = NetworkArguments()
    lora, loha, kron = LoRA.fresh("x", layer, 64, 1, arguments), LoHa.fresh("x", layer, 64, 1, arguments), lokr(layer, 100)
    assert float(lora.lora_down.weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * 256), rel=0.05)
    assert not lora.lora_up.weight.any() and not loha.hada_w2_a.any() and kron.lokr_w2 is not None and not kron.lokr_w2.any()
    spreads = [float(parameter.detach().std()) for parameter in (loha.hada_w1_a, loha.hada_w1_b, loha.hada_w2_b)]
    assert spreads == pytest.approx([0.1, 1.0, 1.0], rel=0.05)
    assert kron.lokr_w1 is not None and float(kron.lokr_w1.detach().std()) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.1)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(512, -1, (16, 32)), (512, 4, (4, 128)), (48, 16, (3, 16)), (64, 16, (4, 16)), (30, 4, (3, 10)), (50, 4, (2, 25)), (37, -1, (1, 37)),
     (31, 8, (1, 31)), (1280, -1, (32, 40)), (2816, -1, (44, 64)), (1, -1, (1, 1))],
)  # fmt: skip
def test_factorisation_is_that_of_lycoris_and_sd_scripts(size: int, factor: int, expected: tuple[int, int]):
    assert factorise(size, factor) == expected


@given(st.integers(1, 20_000), st.one_of(st.just(-1), st.integers(1, 300)))
def test_factors_multiply_to_the_size_in_order(size: int, factor: int):
    m, n = factorise(size, factor)
    assert m * n == size and 1 <= m <= n and (factor == -1 or m <= factor)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.one_of(st.just(-1), st.integers(1, 9)))
def test_lokr_of_any_shape_applies_its_formula(out: int, inner: int, rank: int, factor: int):
    layer = nn.Linear(inner, out)
    adapter = filled(lokr(layer, rank, factor=factor))
    x = torch.randn(3, inner)
    torch.testing.assert_close(adapter(x), x @ adapter.delta_weight().T, rtol=1e-4, atol=1e-5)


def test_a_whole_second_factor_has_scale_one_and_says_so_once():
    layers = [nn.Linear(24, 32) for _ in range(3)]
    adapters = [lokr(layer, rank, alpha=1) for layer, rank in zip(layers, (4, 4, 2), strict=True)]
    assert [adapter.scale for adapter in adapters] == [1, 1, 0.5]
    assert [float(adapter.alpha) for adapter in adapters] == [4, 4, 1]
    remarks = LoKr.remarks(adapters)
    assert len(remarks) == 1 and remarks[0].startswith("LoKr: 2 of 3 layers store a whole second factor")
    assert LoKr.remarks([lokr(layer, 4, alpha=4) for layer in layers]) == []


def test_a_pointwise_second_factor_is_written_4d_and_read_2d_too():
    layer = nn.Conv2d(24, 16, 1)
    state = filled(lokr(layer, 16, factor=4)).state_dict()
    assert state["lokr_w2"].shape == (4, 6, 1, 1)
    flat = LoKr.from_tensors("x", layer, {**state, "lokr_w2": state["lokr_w2"].reshape(4, 6)})
    assert torch.equal(flat.delta_weight(), LoKr.from_tensors("x", layer, state).delta_weight())


def test_lokr_reads_its_split_from_the_tensors_and_not_from_an_argument():
    layer = nn.Linear(64, 48)
    written = filled(lokr(layer, 2, factor=4))
    assert LoKr.from_tensors("x", layer, written.state_dict()).split == written.split != lokr(layer, 2).split


@pytest.mark.parametrize("alpha", [1e10, float("inf"), None])
def test_an_alpha_without_meaning_does_no_harm_where_both_factors_are_whole(alpha: float | None):
    layer = nn.Linear(24, 32)
    state = dict(filled(lokr(layer, 100)).state_dict())
    expected = torch.kron(state["lokr_w1"], state["lokr_w2"])
    state.pop("alpha")
    if alpha is not None:
        state["alpha"] = torch.tensor(alpha)
    torch.testing.assert_close(LoKr.from_tensors("x", layer, state).delta_weight(), expected)


def test_a_file_without_alpha_means_the_rank():
    layer = nn.Linear(5, 6)
    state = dict(filled(LoRA("x", layer, rank=4, alpha=2)).state_dict())
    del state["alpha"]
    assert LoRA.from_tensors("x", layer, state).scale == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_up.weight": torch.zeros(7, 4)}, r"x.lora_up.weight has the shape \[7, 4\]; \[6, 4\] was expected"),
        ({"alpha": torch.tensor(float("nan"))}, "x.alpha: nan is not a finite number"),
        ({"hada_w1_a": torch.zeros(1)}, "has hada_w1_a, which this LoRA has not"),
        ({"lora_up.weight": None}, "lacks lora_up.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict, words: str):
    layer = nn.Linear(5, 6)
    state = {**LoRA.fresh("x", layer, 4, 2, NetworkArguments()).state_dict(), **change}
    with pytest.raises(ValueError, match=words):
        LoRA.from_tensors("x", layer, {key: value for key, value in state.items() if value is not None})


def test_lokr_factors_that_make_another_shape_are_refused():
    state = lokr(nn.Linear(24, 32), 2).state_dict()
    with pytest.raises(ValueError, match=r"x: w1 \(4, 4\) and w2 with 8 rows do not make a weight of shape \[33, 24\]"):
        LoKr.from_tensors("x", nn.Linear(24, 33), state)
