"""Packed weights: a layer computes as the weight that its codes stand for, and keeps nothing else."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.core import quantised
from library.core.quantised import FormName, Packed, pack_layers, packed_bytes, refusal

FORMS: tuple[FormName, ...] = ("fp8_scaled", "int8", "nf4")
LARGEST_ERROR = {"fp8_scaled": 0.03, "int8": 0.01, "nf4": 0.1}  # of normally distributed weights, relative
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(96, 64), (2, 5, 96)),
    "uneven linear": (lambda: nn.Linear(62, 5, bias=False), (4, 62)),
    "convolution": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 7)),
    "grouped convolution": (lambda: nn.Conv2d(16, 24, 3, dilation=2, groups=4), (2, 16, 9, 7)),
}


class Wide(nn.Linear):
    """A Linear that autocast does not narrow."""

    keeps_dtype = True


class Own(nn.Linear):
    """A Linear that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        """Twice the product."""
        return 2 * super().forward(input)


def packed(layer: nn.Module, form: FormName) -> Packed:
    """The layer that takes the place of `layer`, whose weight is random."""
    model = nn.Sequential(layer).requires_grad_(False)
    assert pack_layers(model, form, smallest=0) == 1
    return cast(Packed, model[0])


def like(layer: nn.Module, other: Packed) -> nn.Module:
    """`layer` with the weights that a packed one stands for."""
    own = cast(Any, layer.requires_grad_(False))
    own.weight.copy_(other.dense_weight())
    if own.bias is not None:
        own.bias.copy_(other.bias)
    return layer


def output_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    return y.detach(), gradient


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_computes_as_its_dense_weight_does(name: str, form: FormName) -> None:
    make, shape = LAYERS[name]
    layer, x = packed(make(), form), torch.randn(shape)
    torch.testing.assert_close(output_and_gradient(layer, x), output_and_gradient(like(make(), layer), x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["", "small"])
def test_weights_come_back_within_the_error_of_their_form(form: FormName, scale: float) -> None:
    layer = nn.Linear(256, 64)
    nn.init.normal_(layer.weight, std=scale)
    weight = layer.weight.detach().clone()
    error = packed(layer, form).dense_weight() - weight
    assert 0 < float(error.norm() / weight.norm()) < LARGEST_ERROR[form]


def test_scales_save_what_plain_fp8_loses_of_small_weights() -> None:
    weight = torch.randn(64, 256) * 0.003
    layer = nn.Linear(256, 64)
    layer.weight.data = weight.clone()
    plain = (weight.to(torch.float8_e4m3fn).float() - weight).norm()
    assert float((packed(layer, "fp8_scaled").dense_weight() - weight).norm()) < 0.25 * float(plain)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_zeros_stays_zero(form: FormName) -> None:
    layer = nn.Linear(64, 3)
    layer.weight.data[1] = 0
    assert not packed(layer, form).dense_weight()[1].any()


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_take_the_bytes_that_are_forecast(form: FormName) -> None:
    layer = packed(nn.Conv2d(16, 24, 3), form)
    found = sum(tensor.numel() * tensor.element_size() for tensor in (layer.weight, layer.scales))
    assert found == packed_bytes(form, (24, 16, 3, 3))


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_pass_keeps_codes_and_no_dense_weight(form: FormName) -> None:
    layer, kept = packed(nn.Linear(96, 64), form), []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        layer(torch.randn(2, 96, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("form", FORMS)
def test_autocast_sets_the_dtype_but_of_layers_that_keep_theirs(form: FormName) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(nn.Linear(64, 64), form)(torch.randn(2, 64)).dtype == torch.bfloat16
        assert packed(Wide(64, 64), form)(torch.randn(2, 64)).dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_a_cast_of_the_model_leaves_codes_and_scales(form: FormName) -> None:
    layer = packed(nn.Linear(64, 64), form)
    before, dtype = layer.dense_weight(), layer.weight.dtype
    layer.to(torch.bfloat16)
    assert (layer.weight.dtype, layer.scales.dtype, layer.bias.dtype) == (dtype, torch.float32, torch.bfloat16)
    assert torch.equal(layer.dense_weight(), before)


def test_small_layers_and_those_that_compute_otherwise_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Own(64, 64), nn.Conv2d(64, 64, 3, padding_mode="reflect"), nn.Linear(64, 64))
    assert pack_layers(model, "int8", smallest=1024) == 1
    assert [isinstance(layer, Packed) for layer in model] == [False, False, False, True]


def test_a_layer_in_two_places_is_packed_once() -> None:
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"one": nn.Sequential(layer), "other": layer})
    assert pack_layers(model, "int8", smallest=0) == 1
    assert cast(Any, model)["one"][0] is model["other"]


def test_what_is_packed_is_not_packed_again() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    assert (pack_layers(model, "nf4", smallest=0), pack_layers(model, "int8", smallest=0)) == (1, 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_cpu_can_hold_every_form(form: FormName) -> None:
    assert refusal(form, torch.device("cpu")) is None


def test_a_device_that_cannot_pack_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(weight: Tensor, form: FormName) -> Any:
        raise RuntimeError("no such kernel\nsee above")

    monkeypatch.setattr(quantised, "_pack", cannot)
    assert refusal("nf4", torch.device("cpu")) == "weights cannot be packed on the device cpu (no such kernel)"
