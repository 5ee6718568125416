"""One layer and its adapters, where the layer is used or made in unusual ways."""

import copy
from typing import Any

import pytest
import torch
from adapter_cases import filled
from torch import nn

import networks
from networks.base import Adapter
from networks.extras import Dropouts
from networks.kernels import products
from networks.members import algorithms
from networks.network import Network


def adapted(model: nn.Module, name: str | None = None) -> Network:
    network = networks.create_network(model.requires_grad_(False), rank=2, name=name, target_modules="all-linear").eval()
    for adapter in network.adapters:
        filled(adapter)
    return network


def test_an_input_may_be_given_by_name():
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    adapted(model).attach()
    assert torch.equal(model[0](input=x), model[0](x))


def test_several_adapters_and_the_base_are_rounded_once():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    x = torch.randn(32, 64).to(torch.bfloat16)
    exact = nn.functional.linear(x.double(), model[0].weight.double(), model[0].bias.double())
    for name in ("a", "b", "c"):
        network = adapted(model, name)
        exact = exact + network.adapters[0](x)
        network.attach()
    output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
@pytest.mark.parametrize(("way", "count"), [("direct", 1), ("dropouts", 1), ("direct", 2)])
def test_a_delta_far_below_the_last_bit_of_the_output_is_seen(
    algorithm: type[Adapter], way: str, count: int, is_emulated: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_is_emulated", lambda dtype: is_emulated)
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 128).requires_grad_(False).to(torch.bfloat16), torch.randn(2048, 64).to(torch.bfloat16)
    base = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = torch.zeros_like(base)
    for _ in range(count):
        adapter = filled(algorithm.fresh("x", layer, 4, 1.0, algorithm.Arguments()))
        adapter.dropouts = Dropouts(rank=1e-9) if way == "dropouts" else Dropouts()
        adapter.multiplier = float(1e-3 * layer.weight.float().norm() / adapter.delta_weight().norm()) / count
        exact += x.double() @ adapter.delta_weight().double().T * adapter.multiplier
        adapter.attach()
    seen = layer(x).double() - base
    assert float((seen * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_a_base_stored_in_float8_with_its_bias_is_adapted(algorithm: type[Adapter], is_emulated: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_is_emulated", lambda dtype: is_emulated)
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16).requires_grad_(False).to(torch.float8_e4m3fn), torch.randn(4, 32)
    adapter = filled(algorithm.fresh("x", layer, 2, 1.0, algorithm.Arguments()))
    adapter.attach()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    exact = nn.functional.linear(x, layer.weight.float() + adapter.delta_weight(), layer.bias.float())
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)


def test_a_computed_weight_is_not_merged_into():
    model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))), torch.randn(3, 6)
    base, network = model(x), adapted(model)
    with pytest.raises(ValueError, match="lora_unet_0: its layer computes its weight .*can be attached to it, not merged"):
        network.merge()
    assert not any(adapter.is_merged for adapter in network.adapters)
    network.attach()
    assert not torch.equal(model(x), base)


def test_layers_whose_weights_torch_reads_past_their_forward_are_adapted():
    torch.manual_seed(0)
    model: Any = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    network = adapted(model)
    with torch.no_grad():
        base = model(x)
        network.attach()
        attached = model(x)
        network.detach()
        assert torch.equal(model(x), base)
        network.merge()
        assert not torch.equal(attached, base)
        torch.testing.assert_close(model(x), attached)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_that_cannot_be_merged_whole_is_not_merged_at_all():
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    network, before = adapted(model), model[0].weight.clone()
    model[1].weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="lora_unet_1: its layer holds a packed"):
        network.merge()
    assert torch.equal(model[0].weight, before) and not any(adapter.is_merged for adapter in network.adapters)


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv1d(8, 6, 3, padding=1, bias=False)])
def test_a_magnitude_is_of_the_base_whatever_is_merged_beside_it(layer: nn.Module, on_output: bool):
    torch.manual_seed(0)
    model, x = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False), torch.randn(2, 8, 8)
    plain = networks.create_network(model, rank=2, name="plain", target_modules=["0"]).eval()
    dora = networks.create_network(model, rank=2, name="dora", target_modules=["0"], dora_wd=True, wd_on_output=on_output).eval()
    for network in (plain, dora):
        filled(network.adapters[0])
        network.attach()
    expected, delta = model(x), dora.adapters[0].delta_weight()
    for network in (plain, dora):
        network.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(dora.adapters[0].delta_weight(), delta)
    plain.unmerge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_gradients_per_sample_by_functorch_are_those_of_autograd(algorithm: type[Adapter]):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8).requires_grad_(False), torch.randn(3, 4, 6)
    filled(algorithm.fresh("x", layer, 2, 1.0, algorithm.Arguments())).attach()
    found = torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(x)
    x.requires_grad_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
