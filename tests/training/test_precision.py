"""Precision of a run: which ways to keep weights go together, and what they leave of a denoiser."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_anima import build_small_anima
from torch import Tensor, nn

from library.core.quantised import Packed
from library.core.quantised import pack_layers as packs_large_layers
from library.models.anima.denoiser import AnimaDiT
from library.models.attention import set_attention
from library.training import precision
from library.training.precision import PrecisionOptions, narrow_adapters, refuse_what_the_device_cannot, store_base, weight_bytes
from networks import lora

CPU = torch.device("cpu")
STORAGES: dict[str, dict[str, Any]] = {
    "fp8": {"fp8_base": True},
    "fp8_scaled": {"fp8_scaled": True},
    "int8": {"quantize_base": "int8"},
    "nf4": {"quantize_base": "nf4"},
}


@pytest.fixture
def unet(small_sdxl_modules: SimpleNamespace) -> nn.Module:
    unet = copy.deepcopy(small_sdxl_modules.unet)
    set_attention(unet, "torch")
    return unet


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the small layers of tiny models too."""
    monkeypatch.setattr(precision, "pack_layers", partial(packs_large_layers, smallest=64))


def of_unet(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 192, generator=generator)
    added = {"text_embeds": torch.randn(2, 128, generator=generator), "time_ids": torch.zeros(2, 6)}
    return unet(latents, torch.tensor([5, 900]), text, added_cond_kwargs=added).sample


def of_dit(dit: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 16, 4, 6, generator=generator), torch.randn(2, 7, 24, generator=generator)
    return dit(latents, torch.tensor([0.1, 0.9]), text)


@pytest.mark.parametrize("family", ["SDXL", "Anima"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_network_trains_on_a_stored_base_of_every_family(family: str, storage: str, unet: nn.Module, every_layer: None) -> None:
    modules: Any = build_small_anima().denoiser
    denoiser = unet if family == "SDXL" else AnimaDiT(modules["transformer"], modules["text_conditioner"])
    run = of_unet if family == "SDXL" else of_dit
    plain, before = run(denoiser).detach(), weight_bytes(denoiser)
    store_base(denoiser.requires_grad_(False), PrecisionOptions(mixed_precision="bf16", **STORAGES[storage]), CPU)
    assert weight_bytes(denoiser) < 0.6 * before
    network = lora.create_network(1.0, 2, 1.0, None, [], denoiser)
    network.attach()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(denoiser)
    assert float((output.detach() - plain).norm() / plain.norm()) < (0.5 if storage == "nf4" else 0.15)
    output.float().square().mean().backward()
    assert all(adapter.lora_up.weight.grad is not None for adapter in network.adapters)


def test_names_of_layers_stay_so_that_networks_find_them(unet: nn.Module, every_layer: None) -> None:
    before = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    store_base(unet, PrecisionOptions(quantize_base="nf4"), CPU)
    after = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert before == set(after) and sum(isinstance(module, Packed) for module in after.values()) > 50


def test_the_log_says_how_many_layers_and_bytes(unet: nn.Module, every_layer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(precision.logger, "info", lambda message, *values: said.append(message % values))
    store_base(unet, PrecisionOptions(quantize_base="int8"), CPU)
    assert (
        len(said) == 1
        and said[0].startswith("int8: the weights of ")
        and "layers of the denoiser are packed as int8; it takes 0.00 GB instead of 0.01 GB" in said[0]
    )


def test_without_an_option_weights_stay_bit_for_bit(unet: nn.Module) -> None:
    before = copy.deepcopy(unet.state_dict())
    store_base(unet, PrecisionOptions(), CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize(
    ("given", "storage"),
    [
        ({}, None),
        ({"fp8_base_unet": True}, "fp8"),
        ({"fp8_base": True, "fp8_scaled": True}, "fp8_scaled"),
        ({"quantize_base": "nf4"}, "nf4"),
    ],
)
def test_the_options_name_one_storage(given: dict[str, Any], storage: str | None) -> None:
    assert PrecisionOptions(mixed_precision="bf16", **given).storage == storage


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"fp8_base": True}, "--fp8_base: fp8 weights are only stored; computing needs --mixed_precision bf16 or fp16"),
        ({"fp8_base_unet": True}, "--fp8_base_unet: fp8 weights are only stored"),
        ({"quantize_base": "nf4", "fp8_scaled": True}, "--quantize_base nf4 and --fp8_scaled exclude each other"),
        ({"quantize_base": "int8", "fp8_base": True, "mixed_precision": "bf16"}, "--quantize_base int8 and --fp8_base exclude each other"),
        ({"full_bf16": True}, "--full_bf16: needs --mixed_precision bf16, not no"),
    ],
)
def test_what_does_not_go_together_is_said(given: dict[str, Any], problem: str) -> None:
    assert any(problem in said for said in PrecisionOptions(**given).check())


@pytest.mark.parametrize("given", [{"quantize_base": "nf4"}, {"fp8_scaled": True}, {"full_bf16": True, "mixed_precision": "bf16"}])
def test_packed_weights_need_no_autocast(given: dict[str, Any]) -> None:
    assert not list(PrecisionOptions(**given).check())


@pytest.mark.parametrize(("storage", "name"), [("fp8", "--fp8_base"), ("fp8_scaled", "--fp8_scaled"), ("nf4", "--quantize_base nf4")])
def test_a_device_that_cannot_hold_a_storage_is_refused_by_name(storage: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fp8_refusal", lambda device: "no such dtype")
    monkeypatch.setattr(precision, "refusal", lambda form, device: "no such dtype")
    with pytest.raises(ValueError, match=f"{name}: no such dtype; leave it out or use a device that can"):
        refuse_what_the_device_cannot(PrecisionOptions(mixed_precision="bf16", **STORAGES[storage]), CPU)


@pytest.mark.parametrize("given", STORAGES.values(), ids=STORAGES)
def test_a_cpu_holds_every_storage(given: dict[str, Any]) -> None:
    refuse_what_the_device_cannot(PrecisionOptions(mixed_precision="bf16", **given), CPU)


def test_full_bf16_trains_the_same_parameters_in_bf16_and_keeps_alphas(unet: nn.Module) -> None:
    network = lora.create_network(1.0, 2, 1.0, None, [], unet.requires_grad_(False))
    network.attach()
    before = list(network.parameters())
    narrow_adapters(network, PrecisionOptions())
    assert {parameter.dtype for parameter in before} == {torch.float32}
    narrow_adapters(network, PrecisionOptions(full_bf16=True, mixed_precision="bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        of_unet(unet).float().square().mean().backward()
    assert all(one is other for one, other in zip(before, network.parameters(), strict=True))
    assert (
        {parameter.dtype for parameter in before}
        == {torch.bfloat16}
        == {parameter.grad.dtype for parameter in before if parameter.grad is not None}
    )
    assert {adapter.alpha.dtype for adapter in network.adapters} == {torch.float32}
