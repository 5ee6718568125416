"""DoRA: norms without the delta, detached or not, on any base, and what strength means."""

from dataclasses import replace

import pytest
import torch
from adapter_cases import KINDS, filled, relative_error
from torch import nn

from networks import dora
from networks.base import Adapter
from networks.members import algorithms

PLACES = [(axis, kind) for axis in ("out", "in") for kind in ("linear", "conv3x3", "conv3x3-grouped", "conv1d")]


def adapted(algorithm: type[Adapter], kind: str, **arguments: object) -> Adapter:
    torch.manual_seed(2)
    layer = KINDS[kind].make().requires_grad_(False)
    return filled(algorithm.fresh("lora_unet_x", layer, 2, 1.5, algorithm.Arguments(dora_wd=True, **arguments)))


@pytest.mark.parametrize(("axis", "kind"), PLACES)
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_the_overlap_with_the_weight_is_that_of_the_whole_delta(algorithm: type[Adapter], axis: dora.Axis, kind: str):
    adapter = adapted(algorithm, kind).double()
    weight = adapter.layer.weight.double().reshape(adapter.shape.out, adapter.shape.inner, -1)
    expected = dora.overlap_of_dense(adapter.formula().reshape(weight.shape), weight, axis)
    for found, wanted in zip(adapter.overlap(weight, axis), expected, strict=True):
        assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize(("axis", "kind"), PLACES)
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_the_changed_weight_has_the_learned_magnitudes(algorithm: type[Adapter], axis: dora.Axis, kind: str):
    adapter = adapted(algorithm, kind, wd_on_output=axis == "out")
    assert adapter.dora_scale is not None
    changed = (adapter.layer.weight + adapter.delta_weight()).reshape(adapter.shape.out, adapter.shape.inner, -1)
    norms = torch.linalg.vector_norm(changed, dim=dora.SUMMED[axis])
    torch.testing.assert_close(norms, adapter.dora_scale.detach().flatten())
    moved = (adapter.layer.weight + adapter.direction()).reshape_as(changed)  # the direction is that of W + D
    turned = torch.linalg.vector_norm(moved, dim=dora.SUMMED[axis], keepdim=True)
    magnitude = norms.unsqueeze(1).unsqueeze(2) if axis == "out" else norms[None, :, None]
    torch.testing.assert_close(changed, moved / turned * magnitude)


def gradient(adapter: Adapter, frozen: bool) -> dict[str, torch.Tensor]:
    """The gradients of one output, with the norm frozen by hand or as the adapter does it."""
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    adapter.zero_grad()
    if frozen:
        gain = adapter.gain(adapter.layer.weight).detach() / adapter.dora_scale.detach().flatten()
        weight = adapter.layer.weight + adapter.direction()
        y = x @ (weight * (gain * adapter.dora_scale.flatten()).unsqueeze(1)).T
    else:
        y = x @ adapter.layer.weight.T + adapter(x)
    y.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


def test_the_norm_has_no_gradient_unless_asked_for():
    algorithm = algorithms()[0]
    adapter = adapted(algorithm, "linear")
    expected = gradient(adapter, frozen=True)
    for name, value in gradient(adapter, frozen=False).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    adapter.extras = replace(adapter.extras, full_norm=True)
    full = gradient(adapter, frozen=False)
    assert any(relative_error(full[name], expected[name]) > 1e-3 for name in expected)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_strength_goes_from_the_base_to_the_changed_weight(axis: str):
    adapter = adapted(algorithms()[0], "linear", wd_on_output=axis == "out").eval()
    x = torch.randn(2, 12)
    base = adapter.layer(x)
    change = adapter.delta_weight()
    adapter.attach()
    adapter.multiplier = 0.0
    assert torch.equal(adapter.layer(x), base)
    adapter.multiplier = 0.4
    torch.testing.assert_close(adapter.layer(x), base + 0.4 * x @ change.T)


def test_a_magnitude_of_another_length_is_refused():
    algorithm, layer = algorithms()[0], nn.Linear(12, 18)
    state = algorithm.fresh("x", layer, 2, 1, algorithm.Arguments(dora_wd=True)).state_dict()
    with pytest.raises(ValueError, match=r"x.dora_scale has the shape \[5, 1\]; \[18, 1\] or \[1, 12\] was expected"):
        algorithm.from_tensors("x", layer, {**state, "dora_scale": torch.ones(5, 1)})


def test_dora_of_a_base_without_weights_is_refused():
    algorithm = algorithms()[0]
    with torch.device("meta"):
        layer = nn.Linear(12, 18)
    with pytest.raises(ValueError, match="the weights of this Linear are not loaded"):
        algorithm.fresh("x", layer, 2, 1, algorithm.Arguments(dora_wd=True))


@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_a_quantised_base_is_adapted_as_the_weight_it_stands_for(algorithm: type[Adapter], kind: str):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make = bitsandbytes.nn.Linear4bit if kind == "4 bit" else bitsandbytes.nn.Linear8bitLt
    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=False)
    options = {"quant_type": "nf4"} if kind == "4 bit" else {"has_fp16_weights": False}
    layer = make(64, 64, bias=False, **options)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    x = torch.randn(4, 64)
    layer(x)  # bitsandbytes packs at the first call at the latest
    adapter = filled(algorithm.fresh("x", layer, 4, 2, algorithm.Arguments(dora_wd=True)), 0.1).eval()
    assert relative_error(adapter.magnitudes(), plain.weight.norm(dim=1)) < 0.05
    stands_for = layer(torch.eye(64)).float().T.detach()
    change = adapter(x)
    assert relative_error(change, x @ adapter.delta_weight(stands_for).T) < 0.02
    with pytest.raises(ValueError, match="packed"):
        adapter.merge()


@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize(("base", "parameters"), [(torch.float64, torch.float32), (torch.float32, torch.float8_e4m3fn)])
def test_the_norm_takes_a_base_of_any_width(algorithm: type[Adapter], base: torch.dtype, parameters: torch.dtype):
    layer = nn.Linear(12, 18).to(base)
    adapter = algorithm.fresh("lora_unet_x", layer, 2, 1.0, algorithm.Arguments(dora_wd=True)).to(parameters)
    assert adapter.delta_weight().dtype == torch.float32
    torch.testing.assert_close(adapter.gain(layer.weight.detach()), torch.ones(18), rtol=0.1, atol=0)
