"""Attention back-ends: the same attention through any of them, and what each cannot do said before it fails."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_anima import build_small_anima
from torch import Tensor, nn

from library.models import attention
from library.models.anima.denoiser import AnimaDiT
from library.models.attention import BACKENDS, TrainingAttention, refuse_attention, rotated, set_attention


@dataclass(frozen=True)
class Denoiser:
    """A tiny denoiser, a call of it with three samples, and how many layers attend."""

    module: nn.Module
    run: Callable[[nn.Module], Tensor]
    layers: int


def anima() -> Denoiser:
    modules: Any = build_small_anima().denoiser
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(3, 16, 4, 6, generator=generator), torch.randn(3, 7, 24, generator=generator)
    denoiser = AnimaDiT(modules["transformer"], modules["text_conditioner"])
    return Denoiser(denoiser, lambda denoiser: denoiser(latents, torch.tensor([0.1, 0.5, 0.9]), text), 2 * len(denoiser.blocks()))


def unet(modules: SimpleNamespace) -> Denoiser:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 192, generator=generator)
    added = {"text_embeds": torch.randn(3, 128, generator=generator), "time_ids": torch.zeros(3, 6)}

    def run(denoiser: nn.Module) -> Tensor:
        return denoiser(latents, torch.tensor([5, 500, 900]), text, added_cond_kwargs=added).sample

    denoiser = copy.deepcopy(modules.unet)
    return Denoiser(denoiser, run, sum(name.endswith(("attn1", "attn2")) for name, _ in denoiser.named_modules()))


@pytest.fixture(params=["Anima", "SDXL"])
def denoiser(request: pytest.FixtureRequest, small_sdxl_modules: SimpleNamespace) -> Denoiser:
    return anima() if request.param == "Anima" else unet(small_sdxl_modules)


def nhd(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What the packages compute: (batch, tokens, heads, width) in and out."""
    assert query.shape[-2:] == key.shape[-2:] == value.shape[-2:] and options in ({}, {"tensor_layout": "NHD"})
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages, which compute the same on the CPU."""
    build_small_anima()  # diffusers, imported after this, would take the stand-ins for the packages
    for name, function in (
        ("flash_attn", "flash_attn_func"),
        ("sageattention", "sageattn"),
        ("xformers.ops", "memory_efficient_attention"),
    ):
        module = ModuleType(name)
        setattr(module, function, nhd)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))


def test_positions_rotate_as_in_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb

    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(2, 5, 3, 8, generator=generator), torch.randn(5, 4, generator=generator).repeat(1, 2)
    tables: Any = (angles.cos(), angles.sin())
    expected: Any = apply_rotary_emb(x.transpose(1, 2), tables, use_real_unbind_dim=-2)
    torch.testing.assert_close(rotated(x, angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)), expected.transpose(1, 2))


@pytest.mark.parametrize("mode", BACKENDS)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_every_mode_attends_alike(mode: str, split: bool, denoiser: Denoiser, packages: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_checked", lambda attend, mode, backend: attend)
    expected = denoiser.run(denoiser.module)
    set_attention(denoiser.module, mode, split)
    torch.testing.assert_close(denoiser.run(denoiser.module), expected)


def test_torch_computes_bit_for_bit_what_diffusers_processor_does(small_sdxl_modules: SimpleNamespace):
    denoiser = unet(small_sdxl_modules)
    expected = denoiser.run(denoiser.module)
    set_attention(denoiser.module, "torch")
    assert torch.equal(denoiser.run(denoiser.module), expected)


def test_every_attention_of_the_denoiser_is_set(denoiser: Denoiser, packages: None, monkeypatch: pytest.MonkeyPatch):
    batches: list[int] = []
    monkeypatch.setattr(attention, "_checked", lambda attend, mode, backend: lambda *qkv: (batches.append(len(qkv[0])), attend(*qkv))[1])
    set_attention(denoiser.module, "flash")
    denoiser.run(denoiser.module)
    assert batches == [3] * denoiser.layers


def test_split_attention_computes_one_sample_at_a_time(denoiser: Denoiser, packages: None, monkeypatch: pytest.MonkeyPatch):
    batches: list[int] = []
    monkeypatch.setattr(attention, "_checked", lambda attend, mode, backend: lambda *qkv: (batches.append(len(qkv[0])), attend(*qkv))[1])
    set_attention(denoiser.module, "flash", split=True)
    denoiser.run(denoiser.module)
    assert batches == [1] * 3 * denoiser.layers


def test_an_unknown_mode_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="--attn_mode: unknown attention mode 'sageatn'; did you mean 'sageattn'"):
        set_attention(nn.Identity(), "sageatn")


@pytest.mark.parametrize(
    ("mode", "module", "package"),
    [("flash", "flash_attn", "flash-attn"), ("sageattn", "sageattention", "sageattention"), ("xformers", "xformers.ops", "xformers")],
)
def test_a_package_that_is_not_there_is_named(mode: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"--attn_mode {mode}: needs the package {package} .pip install {package}."):
        set_attention(nn.Identity(), mode)


def test_a_kernel_without_backward_pass_is_refused_for_training(packages: None):
    with pytest.raises(ValueError, match="--attn_mode sageattn: it has no backward pass.*there are: torch, sdpa, flash, xformers"):
        set_attention(nn.Identity(), "sageattn", trains=True)


@pytest.mark.parametrize("mode", ["flash", "sageattn", "xformers"])
def test_kernels_for_gpus_say_so_on_a_cpu(mode: str, denoiser: Denoiser, packages: None):
    set_attention(denoiser.module, mode)
    with pytest.raises(ValueError, match=f"--attn_mode {mode}: .* runs on CUDA only, not on cpu"):
        denoiser.run(denoiser.module)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"attn_mode": "sageattn"}, "--attn_mode sageattn: it has no backward pass"),
        ({"attn_mode": "flash", "xformers": True}, "--xformers and --attn_mode flash exclude each other"),
        ({"xformers": True}, "--attn_mode xformers: needs the package xformers"),
    ],
    ids=["sageattn", "two modes", "not installed"],
)
def test_training_says_at_once_which_attention_cannot_be(given: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert any(problem in said for said in TrainingAttention(**given).attention_problems())


@pytest.mark.parametrize("given", [{}, {"attn_mode": "sdpa"}, {"attn_mode": "torch", "split_attn": True}])
def test_torchs_own_attention_is_always_there(given: dict[str, Any]):
    assert not list(TrainingAttention(**given).attention_problems())


@pytest.mark.parametrize(
    ("mode", "device", "dtype", "message"),
    [
        ("flash", "cpu", torch.bfloat16, "--attn_mode flash: flash-attn runs on CUDA only, not on cpu"),
        ("xformers", "cpu", torch.float32, "--attn_mode xformers: xformers runs on CUDA only, not on cpu"),
        ("flash", "cuda", torch.float32, "--attn_mode flash: flash-attn computes in bf16 or fp16 only, not in torch.float32"),
    ],
)
def test_a_kernel_that_cannot_train_here_is_refused_before_anything_is_loaded(
    mode: Any, device: str, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_attention(TrainingAttention(attn_mode=mode), torch.device(device), dtype)


def test_a_kernel_that_can_train_here_is_not_refused() -> None:
    refuse_attention(TrainingAttention(), torch.device("cpu"), torch.float32)
    refuse_attention(TrainingAttention(attn_mode="flash"), torch.device("cuda"), torch.bfloat16)
    refuse_attention(TrainingAttention(xformers=True), torch.device("cuda"), torch.float32)
    refuse_attention(object(), torch.device("cpu"), torch.float32)  # a family that brings another attention


class OnGpu:
    """Stands in for a tensor on a GPU."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype, requires_grad: bool = False) -> None:
        self.dtype, self.requires_grad = dtype, requires_grad


@pytest.mark.parametrize(
    ("mode", "given", "message"),
    [
        ("flash", OnGpu(torch.float32), "bf16 or fp16 only, not in torch.float32"),
        ("sageattn", OnGpu(torch.bfloat16, requires_grad=True), "no backward pass"),
    ],
)
def test_what_a_kernel_cannot_take_is_said(mode: str, given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        attention._checked(nhd, mode, BACKENDS[mode])(given, given, given)
