"""The wrapped denoiser: the outputs of the reference and of diffusers' bare classes, their gradients, and what half precision keeps."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_anima import T5_WORDS, TEXT_WIDTH, WIDTH, build_small_anima
from torch import Tensor, nn

from library.core.fp8 import store_as_fp8
from library.core.tensor_file import load_tensors
from library.models.anima.denoiser import AnimaDiT
from library.models.anima.names import NAMING, PARTS
from networks import lora

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "models"
TEXT_LENGTH = 7
CPU = torch.device("cpu")
Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""A function of some tensors, and the tensors."""


def bare(dtype: torch.dtype = torch.float32) -> Any:
    """Diffusers' two classes as they are."""
    return build_small_anima().denoiser.to(dtype)


def wrapped(dtype: torch.dtype = torch.float32) -> AnimaDiT:
    modules: Any = bare(dtype)
    return AnimaDiT(modules["transformer"], modules["text_conditioner"])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    return latents.to(dtype), torch.tensor([0.25, 0.9137]), torch.randn(2, TEXT_LENGTH, 24, generator=generator).to(dtype)


def text(length: int = TEXT_LENGTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of two prompts, the second shorter, as `condition` takes them."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, 3:] = 0
    states = torch.randn(2, length, TEXT_WIDTH, generator=generator) * mask.unsqueeze(-1)
    return states, mask, torch.randint(0, T5_WORDS, (2, length), generator=generator) * mask, mask


def of_bare(modules: Any, latents: Tensor, times: Tensor, conditioning: Tensor) -> Tensor:
    """Velocity of the bare transformer, its inputs in the dtype of its weights."""
    dtype = modules["transformer"].proj_out.weight.dtype
    padded = torch.cat([latents, torch.zeros_like(latents[:, :1])], dim=1).unsqueeze(2)
    (velocity,) = modules["transformer"](padded.to(dtype), times, conditioning.to(dtype), return_dict=False)
    return velocity.squeeze(2)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# The reference


@pytest.fixture(scope="module")
def golden() -> tuple[AnimaDiT, dict[str, Tensor]]:
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden")
    from library.models.anima.checkpoint import load_denoiser

    denoiser = load_denoiser(GOLDEN / "anima_dit_weights.safetensors", dtype=torch.float32, device=CPU)
    return denoiser, load_tensors(GOLDEN / "anima_dit_io.safetensors")


def test_the_conditioning_is_that_of_the_reference(golden: tuple[AnimaDiT, dict[str, Tensor]]):
    denoiser, io = golden
    found = denoiser.condition(io["qwen_hidden_states"], io["qwen_mask"], io["t5_ids"], io["t5_mask"])
    assert float((found - io["conditioning"]).abs().max()) <= 1e-5


def test_the_velocity_is_that_of_the_reference(golden: tuple[AnimaDiT, dict[str, Tensor]]):
    denoiser, io = golden
    found = denoiser(io["latents"].squeeze(2), io["time"], io["conditioning"])
    assert float((found - io["velocity"].squeeze(2)).abs().max()) <= 2e-5


def test_the_velocity_is_that_of_diffusers_classes():
    assert float((wrapped()(*inputs()) - of_bare(bare(), *inputs())).abs().max()) <= 1e-5


def test_the_conditioning_is_that_of_diffusers_classes():
    states, mask, ids, ids_mask = text()
    expected = bare()["text_conditioner"](states, ids, target_attention_mask=ids_mask, source_attention_mask=mask)
    assert float((wrapped().condition(states, mask, ids, ids_mask) - expected).abs().max()) <= 1e-5


# Gradients


def _velocity_of(denoiser: AnimaDiT) -> Case:
    latents, times, conditioning = inputs()

    def call(latents: Tensor, conditioning: Tensor) -> Tensor:
        return denoiser(latents, times, conditioning)

    return call, (latents, conditioning)


def _conditioning_of(denoiser: AnimaDiT) -> Case:
    states, mask, ids, ids_mask = text()
    return lambda states: denoiser.condition(states, mask, ids, ids_mask), (states,)


def gradients(call: Callable[..., Tensor], at: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = tuple(value.to(dtype).requires_grad_() for value in at)
    output = call(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((output * weights).sum(), leaves)


@pytest.mark.parametrize("case", [_velocity_of, _conditioning_of], ids=["velocity", "conditioning"])
def test_gradients_in_float64_are_the_slopes(case: Any):
    call, at = case(wrapped().double())
    found = gradients(call, at, torch.float64)
    generator = torch.Generator().manual_seed(4)
    ways = [torch.randn(value.shape, generator=generator).double() for value in at]
    step = 1e-5
    ahead, behind = (call(*(value.double() + sign * step * way for value, way in zip(at, ways, strict=True))) for sign in (1, -1))
    weights = torch.randn(ahead.shape, generator=torch.Generator().manual_seed(3))
    slope = float(((ahead - behind) * weights).sum()) / (2 * step)
    assert sum(float((gradient * way).sum()) for gradient, way in zip(found, ways, strict=True)) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("case", [_velocity_of, _conditioning_of], ids=["velocity", "conditioning"])
def test_gradients_in_float32_are_those_of_float64(case: Any):
    (call, at), (exact, _) = case(wrapped()), case(wrapped().double())
    found, expected = gradients(call, at, torch.float32), gradients(exact, at, torch.float64)
    assert all(error(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_computes_blocks_again_and_gives_the_same_gradients(dtype: torch.dtype):
    denoiser = wrapped(dtype)
    call, at = _velocity_of(denoiser)
    expected = gradients(call, at, torch.float32)
    runs: list[int] = []
    for n, block in enumerate(denoiser.blocks()):
        block.register_forward_pre_hook(lambda *_, n=n: runs.append(n))
    denoiser.enable_gradient_checkpointing()
    found = gradients(call, at, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert runs == [0, 1, 1, 0]


# Half precision


@pytest.mark.parametrize("weights", [torch.float16, torch.float32], ids=["fp16 weights", "fp16 autocast"])
def test_fp16_stays_finite_where_the_bare_classes_overflow(weights: torch.dtype):
    modules: Any = build_small_anima().denoiser
    for block in modules["transformer"].transformer_blocks:
        block.ff.net[2].weight.mul_(3e3)
        block.norm3.linear_2.weight[-WIDTH:].mul_(100)  # the gate
    half = copy.deepcopy(modules).to(weights)
    autocast = torch.autocast("cpu", torch.float16, enabled=weights is torch.float32)
    with torch.no_grad(), autocast:
        assert not of_bare(half, *inputs()).isfinite().all()
        found = AnimaDiT(half["transformer"], half["text_conditioner"])(*inputs())
    expected = AnimaDiT(modules["transformer"], modules["text_conditioner"])(*inputs())
    assert found.isfinite().all() and error(found, expected) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_less_than_the_bare_classes(dtype: torch.dtype):
    expected = wrapped()(*inputs())
    with torch.no_grad():
        found, plain = error(wrapped(dtype)(*inputs()), expected), error(of_bare(bare(dtype), *inputs()), expected)
    assert found <= plain < 0.02


@pytest.mark.parametrize("is_autocast", [False, True], ids=["alone", "in autocast"])
def test_weights_stored_as_fp8_give_what_their_values_give(is_autocast: bool):
    stored, exact = wrapped(), wrapped()
    for denoiser in (stored, exact):
        store_as_fp8(denoiser)
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found, conditioning = stored(*inputs()), stored.condition(*text())
    assert error(found, exact(*inputs())) < 0.01 and error(conditioning, exact.condition(*text())) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_precision_give_a_float32_velocity(dtype: torch.dtype):
    denoiser = wrapped()
    velocity = denoiser(*inputs(dtype))
    assert velocity.dtype is torch.float32 and error(velocity, denoiser(*inputs())) < 0.01


def test_times_that_bf16_cannot_tell_apart_give_two_velocities():
    denoiser, (latents, _, conditioning) = wrapped(torch.bfloat16), inputs()
    early, late = torch.tensor([0.9130, 0.9130]), torch.tensor([0.9137, 0.9137])
    assert torch.equal(early.bfloat16(), late.bfloat16())
    with torch.no_grad():
        found = denoiser(latents, late, conditioning) - denoiser(latents, early, conditioning)
    assert found.abs().max() > 0
    assert all(state.dtype is torch.float32 for state in denoiser.transformer.time_embed(latents, early))


# Sizes and text


def test_pictures_of_4096_pixels_have_their_positions():
    denoiser, latents = wrapped(), torch.randn(1, 16, 512, 2, generator=torch.Generator().manual_seed(5))
    times, conditioning = torch.tensor([0.5]), inputs()[2][:1]
    found = denoiser(latents, times, conditioning)
    denoiser.transformer.rope.max_size = [1024, 1024, 1024]
    assert torch.equal(found, denoiser(latents, times, conditioning))


@pytest.mark.parametrize(("height", "width", "message"), [(4, 5, "40x32 pixels: .* multiples of 16"), (514, 2, "16x4112 .* reach 4096")])
def test_sides_that_it_cannot_do_are_named(height: int, width: int, message: str):
    _, times, conditioning = inputs()
    with pytest.raises(ValueError, match=message):
        wrapped()(torch.zeros(2, 16, height, width), times, conditioning)


def test_text_is_padded_to_512_and_zero_where_there_is_none():
    found = wrapped().condition(*text())
    assert found.shape == (2, 512, 24)
    assert found[0, :TEXT_LENGTH].abs().amin(dim=0).max() > 0 and found[1, :3].abs().max() > 0
    assert not found[0, TEXT_LENGTH:].any() and not found[1, 3:].any()


def test_text_over_512_tokens_is_not_cut():
    assert wrapped().condition(*text(600)).shape == (2, 600, 24)


def test_padding_that_the_whole_batch_shares_is_not_computed_and_changes_nothing():
    generator = torch.Generator().manual_seed(7)
    states, ids = torch.randn(3, 40, TEXT_WIDTH, generator=generator), torch.randint(0, T5_WORDS, (3, 600), generator=generator)
    mask, ids_mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 600, dtype=torch.int64)
    for row, (words, pieces) in enumerate((([0, 1, 2], [0, 1]), ([], [0]), ([1, 8], [0, 4, 10]))):  # whole, empty, with holes
        mask[row, words], ids_mask[row, pieces] = 1, 1
    seen = mask | (mask.sum(dim=1, keepdim=True) == 0)
    expected = bare()["text_conditioner"](
        states * mask.unsqueeze(-1), ids, target_attention_mask=ids_mask, source_attention_mask=seen.bool()
    )
    denoiser, lengths = wrapped(), []
    for layer in ("q_proj", "k_proj"):
        attention = denoiser.text_conditioner.get_submodule(f"blocks.0.cross_attn.{layer}")
        attention.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    found = denoiser.condition(states, mask, ids, ids_mask)
    assert found.shape == expected.shape == (3, 600, 24) and float((found - expected).abs().max()) <= 1e-5
    assert lengths == [11, 9]


def test_states_outside_the_mask_are_not_looked_at():
    denoiser, (states, mask, *ids) = wrapped(), text()
    assert torch.equal(denoiser.condition(states.masked_fill(mask.unsqueeze(-1) == 0, torch.nan), mask, *ids), denoiser.condition(*text()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_an_empty_prompt_attends_to_nothing(dtype: torch.dtype):
    denoiser, (states, mask, _, _) = wrapped(dtype), text()
    ids = torch.zeros_like(mask)
    ids[:, 0] = 1
    with torch.no_grad():
        empty = denoiser.condition(states, torch.zeros_like(mask), ids, ids)
        blocks: Any = denoiser.text_conditioner.blocks
        for block in blocks:
            block.cross_attn.o_proj.weight.zero_()
        assert torch.equal(empty, denoiser.condition(states, mask, ids, ids))


# Names


def test_wrapping_changes_no_name_and_no_weight():
    before = bare().state_dict()
    after = wrapped().state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert NAMING.recognises(wrapped()) and NAMING.targets(PARTS[0], wrapped()) == NAMING.targets(PARTS[0], bare())


@pytest.mark.parametrize("weights", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_adapters_on_every_layer_add_what_they_merge(weights: torch.dtype):
    denoiser = wrapped(weights)
    with torch.no_grad():
        plain = denoiser(*inputs())
    network = lora.create_network(1.0, 2, 1.0, None, [], denoiser, include_patterns="['.*']", train_llm_adapter="True")
    assert {adapter.layer for adapter in network.adapters} >= {denoiser.transformer.patch_embed.proj, denoiser.transformer.proj_out}
    adapters: Any = network.adapters
    for adapter in adapters:
        nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(6))
    network.attach()
    with torch.no_grad():
        attached = denoiser(*inputs())
        network.detach()
        network.merge()
        merged = denoiser(*inputs())
    assert error(attached, merged) < (1e-5 if weights is torch.float32 else 5e-3) < error(attached, plain)


@pytest.mark.slow
@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "autocast"])
def test_blocks_with_adapters_on_every_layer_compile_to_one_graph(is_autocast: bool):
    torch._dynamo.reset()
    denoiser = wrapped()
    network: Any = lora.create_network(1.0, 2, 1.0, None, [], denoiser, include_patterns="['.*']")
    for adapter in network.adapters:
        nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(6))
    network.attach()
    trained = [parameter for adapter in network.adapters for parameter in adapter.parameters()]

    def step() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            velocity = denoiser(*inputs())
        return [velocity.detach(), *torch.autograd.grad(velocity.square().sum(), trained)]

    expected = step()
    for block in denoiser.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    assert all(error(one, other) < (2e-2 if is_autocast else 1e-5) for one, other in zip(step(), expected, strict=True))
