"""The contract of an adapter, for every algorithm on every kind of layer."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_cases import KINDS, MODES, VARIANTS, Case, filled, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.core.tensor_file import load_tensors, save_tensors
from networks.base import Adapter
from networks.extras import Dropouts

PLAIN = [(algorithm, mode) for algorithm, mode in VARIANTS if mode in ("2", "tucker", "scalar", "both", "full")]


def test_a_fresh_adapter_changes_nothing(case: Case):
    base = case.layer(case.x)
    case.adapter.attach()
    assert torch.equal(case.layer(case.x), base)
    assert torch.count_nonzero(case.adapter.delta_weight()) == 0


def test_the_delta_of_an_input_is_the_delta_weight_applied(case: Case):
    adapter = filled(case.adapter).eval()
    expected = adapter.shape.apply(case.x.double(), adapter.delta_weight().double())
    assert adapter.delta_weight().shape == case.layer.weight.shape
    assert relative_error(adapter(case.x), expected) < 1e-6


def test_every_way_to_a_delta_agrees_with_float64(case: Case, tmp_path: Path):
    adapter = filled(case.adapter).eval()
    twin, layer = copy.deepcopy(adapter).double(), copy.deepcopy(case.layer).double()
    exact = twin.delta_weight(layer.weight).detach()
    assert relative_error(adapter.delta_weight(), exact) < 1e-6
    applied = adapter.shape.apply(case.x.double(), exact)
    assert relative_error(adapter(case.x), applied) < 1e-6
    save_tensors(tmp_path / "a.safetensors", adapter.file_tensors())
    again = type(adapter).from_tensors("lora_unet_x", case.layer, load_tensors(tmp_path / "a.safetensors"))
    assert relative_error(again.delta_weight(), exact) < 1e-6
    adapter.merge()
    assert relative_error(case.layer.weight, layer.weight + exact) < 1e-6


def test_attached_equals_merged(case: Case):
    adapter = filled(case.adapter).eval()
    adapter.multiplier = 0.7
    adapter.attach()
    attached = case.layer(case.x)
    adapter.merge()
    merged = case.layer(case.x)
    adapter.detach()
    torch.testing.assert_close(merged, attached, rtol=1e-5, atol=1e-5)
    assert torch.equal(case.layer(case.x), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_unmerge_restores_the_weight_bit_for_bit(case: Case, dtype: torch.dtype):
    case.layer.to(dtype)
    before = case.layer.weight.clone()
    filled(case.adapter).merge()
    assert not torch.equal(case.layer.weight.float(), before.float())
    case.adapter.unmerge()
    assert torch.equal(case.layer.weight.view(torch.uint8), before.view(torch.uint8))
    assert case.layer.weight.dtype == dtype


def test_a_merge_is_rounded_once(case: Case):
    case.layer.to(torch.bfloat16)
    first, second = filled(case.adapter), filled(case.fresh(case.layer), 0.2)
    expected = case.layer.weight.float() + first.delta_weight() + second.delta_weight()
    first.merge()
    second.merge()
    assert torch.equal(case.layer.weight, expected.detach().to(torch.bfloat16))


def test_every_parameter_has_a_gradient_once_none_is_zero(case: Case):
    filled(case.adapter)(case.x).square().sum().backward()
    for name, parameter in case.adapter.named_parameters():
        assert parameter.grad is not None and torch.count_nonzero(parameter.grad) > 0, name


def test_a_fresh_adapter_can_leave_zero(case: Case):
    case.adapter(case.x).sum().backward()
    assert any(parameter.grad is not None and torch.count_nonzero(parameter.grad) > 0 for parameter in case.adapter.parameters())


def test_gradients_are_those_of_the_delta(case: Case):
    adapter = filled(case.adapter.double())
    case.layer.double()
    adapter.extras = replace(adapter.extras, full_norm=True)
    names = [name for name, _ in adapter.named_parameters()]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,)).sum(dim=0)

    inputs = [case.x.double()[:1].requires_grad_(), *(parameter.detach().requires_grad_() for parameter in adapter.parameters())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_saved_tensors_make_the_same_adapter(case: Case):
    adapter = filled(case.adapter)
    again = type(adapter).from_tensors("lora_unet_x", case.layer, adapter.state_dict())
    assert again.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in adapter.state_dict().items())
    assert torch.equal(again.delta_weight(), adapter.delta_weight())


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize(("algorithm", "mode"), PLAIN, ids=[f"{algorithm.title}-{mode}" for algorithm, mode in PLAIN])
def test_half_precision_keeps_a_small_delta(
    algorithm: type[Adapter], mode: str, kind: str, size: float, dtype: torch.dtype, autocast: bool
):
    arguments = MODES[mode][0]
    torch.manual_seed(1)
    layer = nn.Linear(96, 128) if kind == "linear" else nn.Conv2d(96, 128, 3, padding=1)
    adapter = filled(algorithm.fresh("lora_unet_x", layer, 3, 1.0, algorithm.Arguments(**arguments))).eval()
    with torch.no_grad():
        next(iter(adapter.factors().values())).mul_(size * layer.weight.std() / adapter.delta_weight().std())
    x = torch.randn(8, 96, *adapter.shape.kernel).to(dtype)
    expected = adapter.shape.apply(x.double(), adapter.delta_weight().double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        assert relative_error(adapter(x), expected) < 5e-3


def test_two_adapters_on_a_layer_add_up_and_leave_in_any_order(case: Case):
    first, second = filled(case.adapter).eval(), filled(case.fresh(case.layer), 0.2).eval()
    second.multiplier = -0.5
    base = case.layer(case.x)
    first.attach()
    second.attach()
    torch.testing.assert_close(case.layer(case.x), base + first(case.x) - 0.5 * second(case.x))
    first.detach()
    torch.testing.assert_close(case.layer(case.x), base - 0.5 * second(case.x))
    second.detach()
    assert torch.equal(case.layer(case.x), base)


def test_the_base_keeps_its_tree_and_gets_its_forward_back(case: Case):
    keys, attributes = list(case.layer.state_dict()), set(case.layer.__dict__)
    case.adapter.attach()
    case.adapter.attach()
    assert list(case.layer.state_dict()) == keys
    assert [module for module in case.adapter.modules() if module is case.layer] == []
    case.adapter.detach()
    assert set(case.layer.__dict__) == attributes


def test_switched_off_is_exactly_the_base(case: Case):
    base = case.layer(case.x)
    filled(case.adapter).attach()
    assert not torch.equal(case.layer(case.x), base)
    case.adapter.enabled = False
    assert torch.equal(case.layer(case.x), base)
    case.adapter.enabled, case.adapter.multiplier = True, 0.0
    assert torch.equal(case.layer(case.x), base)


def test_a_copy_of_an_adapted_layer_is_independent(case: Case):
    filled(case.adapter).attach()
    expected = case.layer(case.x)
    twin = copy.deepcopy(case.layer)
    case.adapter.detach()
    assert torch.equal(twin(case.x), expected)
    assert not torch.equal(case.layer(case.x), expected)


def test_alpha_stays_float32_and_follows_loading(case: Case):
    case.adapter.to(torch.bfloat16)
    assert case.adapter.alpha.dtype == torch.float32
    state = dict(case.adapter.state_dict())
    state["alpha"] = torch.tensor(3, dtype=torch.int64)
    before = case.adapter.scale
    case.adapter.load_state_dict(state)
    assert case.adapter.alpha.dtype == torch.float32
    assert case.adapter.scale == pytest.approx(2 * before) or case.adapter.scale == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(case: Case, reentrant: bool):
    adapter = filled(case.adapter)
    adapter.dropouts = Dropouts(neuron=0.2, rank=0.3, module=0.3)
    adapter.attach()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        x = case.x.clone().requires_grad_()
        y = checkpoint(case.layer, x, use_reentrant=reentrant) if recompute else case.layer(x)
        adapter.zero_grad()
        y.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in adapter.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize(("algorithm", "mode"), VARIANTS, ids=[f"{algorithm.title}-{mode}" for algorithm, mode in VARIANTS])
def test_the_whole_graph_compiles(algorithm: type[Adapter], kind: str, mode: str):
    arguments = MODES[mode][0]
    rank = 8 if mode == "8" else 2
    layer, x = KINDS[kind].make(), torch.randn(KINDS[kind].input_shape)
    adapter = filled(algorithm.fresh("lora_unet_x", layer, rank, 1.0, algorithm.Arguments(**arguments))).train()
    adapter.dropouts = Dropouts(neuron=0.1, rank=0.1, module=0.1)
    adapter.attach()
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="eager")
    torch.manual_seed(2)
    expected = layer(x)
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(x), expected)


def test_an_input_without_batch_is_taken(case: Case):
    adapter = filled(case.adapter)
    adapter.dropouts = Dropouts(rank=0.3)
    single = case.x[0] if adapter.shape.kernel else case.x.flatten(0, -2)[0]
    assert adapter(single).shape == case.layer(single).shape
    expected = adapter.eval()(single.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(adapter(single), expected)


# Dropouts


def averaged(adapter: Adapter, x: torch.Tensor, times: int) -> torch.Tensor:
    """The mean delta over many draws for each of two samples: (2, ...)."""
    many = x[:1].expand(times, *x.shape[1:])
    return adapter(many).mean(dim=0)


@pytest.mark.parametrize("dropouts", [Dropouts(neuron=0.3), Dropouts(rank=0.3)], ids=["neuron", "rank"])
def test_dropout_keeps_the_expected_delta(case: Case, dropouts: Dropouts):
    adapter = filled(case.adapter)
    expected = adapter.eval()(case.x[:1])[0]
    adapter.train().dropouts = dropouts
    with torch.no_grad():
        torch.manual_seed(3)
        mean = averaged(adapter, case.x, 4000)
    assert relative_error(mean, expected) < 0.1
    assert relative_error(adapter(case.x[:1])[0], expected) > 0.01


def test_rank_dropout_is_drawn_per_sample_and_shared_by_positions(case: Case):
    adapter = filled(case.adapter)
    adapter.dropouts = Dropouts(rank=0.5)
    shape = adapter.shape
    x = torch.randn(case.x.shape[shape.channel])
    x = shape.along_channels(x, case.x).expand(16, *case.x.shape[1:])
    torch.manual_seed(4)
    y = adapter(x).movedim(shape.channel, -1).flatten(1, -2)  # (16, positions, out)
    assert not torch.allclose(y[0], y[1]) or not torch.allclose(y[0], y[2])
    if shape.is_pointwise:
        torch.testing.assert_close(y, y[:, :1].expand_as(y))


def test_module_dropout_leaves_out_the_whole_delta_unscaled(case: Case):
    adapter = filled(case.adapter)
    expected = adapter.eval()(case.x)
    adapter.train().dropouts = Dropouts(module=0.5)
    torch.manual_seed(0)
    draws = [adapter(case.x) for _ in range(40)]
    left_out = sum(not y.any() for y in draws)
    assert 8 <= left_out <= 32
    assert all(torch.allclose(y, expected) for y in draws if y.any())


def test_dropouts_sleep_outside_training(case: Case):
    adapter = filled(case.adapter).eval()
    expected = adapter(case.x)
    adapter.dropouts = Dropouts(neuron=0.5, rank=0.5, module=0.5)
    assert torch.equal(adapter(case.x), expected)
