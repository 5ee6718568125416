"""Anima's files: any size, prefix, precision and layout into the libraries' classes, and back."""

import gzip
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_anima import SmallAnima, SmallFiles, build_small_anima, write_small_anima
from torch import Tensor, nn

from library.core.tensor_file import load_tensors, save_tensors
from library.models.anima import checkpoint
from library.models.anima.components import CONDITIONER, CONSTANTS, ENCODER, TRANSFORMER, VAE
from library.models.anima.denoiser import AnimaDiT
from library.models.filling import Component, empty, plan

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data"
FP32: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
PARAMETERS = {"transformer": 1_956_405_248, "llm adapter": 134_663_680, "text encoder": 596_049_920, "VAE": 126_892_531}


@pytest.fixture(scope="module")
def models() -> SmallAnima:
    return build_small_anima()


@pytest.fixture(scope="module")
def files(models: SmallAnima, tmp_path_factory: pytest.TempPathFactory) -> SmallFiles:
    return write_small_anima(tmp_path_factory.mktemp("anima"), models)


def assert_same(module: nn.Module, expected: nn.Module) -> None:
    """Equal names, tensors and numbers."""
    state = module.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_tensors(path, tensors)
    return path


def packed(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


def real_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """The shapes of the real checkpoint that belong to this component, without prefixes."""
    if component is VAE:
        return {key: tuple(shape) for key, (_, shape) in packed("vae_shapes.json.gz").items()}
    if component is ENCODER:
        return {key: tuple(shape) for key, shape in packed("qwen3_shapes.json.gz").items()}
    dit = {key.removeprefix("net."): tuple(shape) for key, shape in packed("dit_shapes.json.gz").items() if not CONSTANTS.fullmatch(key)}
    inside = {key.removeprefix("llm_adapter."): shape for key, shape in dit.items() if key.startswith("llm_adapter.")}
    return inside if component is CONDITIONER else {key: shape for key, shape in dit.items() if not key.startswith("llm_adapter.")}


# The real files, without their numbers


@pytest.mark.parametrize("component", [TRANSFORMER, CONDITIONER, ENCODER, VAE], ids=lambda component: component.title)
def test_every_tensor_of_the_real_files_has_its_place(component: Component):
    shapes = real_shapes(component)
    planned = plan(component, shapes)
    state = planned.module.state_dict()
    assert {source.key: tuple(state[name].shape) for name, source in planned.sources.items()} == shapes
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS[component.title]


def test_the_vae_s_places_are_those_of_diffusers_own_script():
    planned = plan(VAE, real_shapes(VAE))
    assert {source.key: name for name, source in planned.sources.items()} == {
        key: path for key, (path, _) in packed("vae_shapes.json.gz").items()
    }


def test_the_real_sizes_are_read_as_the_classes_defaults():
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    config: Any = plan(VAE, real_shapes(VAE)).module.config
    from_defaults: Any = empty(AutoencoderKLQwenImage).config
    assert {key: config[key] for key in config if key[0] != "_"} == {key: from_defaults[key] for key in from_defaults if key[0] != "_"}


def test_the_text_encoder_turns_as_qwen3_does_which_no_shape_tells():
    config: Any = plan(ENCODER, real_shapes(ENCODER)).module.config
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (1_000_000, 1e-6)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 128)


# There and back


@pytest.mark.parametrize("prefix", ["net.", "", "model.diffusion_model."])
def test_the_denoiser_is_read_under_every_prefix(models: SmallAnima, tmp_path: Path, prefix: str):
    path = saved(tmp_path / "dit.safetensors", checkpoint.denoiser_state_dict(models.denoiser, torch.float32, prefix))
    assert_same(checkpoint.load_denoiser(path, **FP32), models.denoiser)


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.qwen3_06b.transformer.model."])
def test_the_text_encoder_is_read_under_every_prefix(models: SmallAnima, tmp_path: Path, prefix: str):
    tensors = checkpoint.text_encoder_state_dict(models.text_encoder, torch.float32)
    path = saved(tmp_path / "qwen3.safetensors", {prefix + key: tensor for key, tensor in tensors.items()})
    assert_same(checkpoint.load_text_encoder(path, **FP32), models.text_encoder)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_vae_is_read_in_both_layouts_under_every_prefix(models: SmallAnima, tmp_path: Path, prefix: str, layout: str):
    tensors = models.vae.state_dict() if layout == "diffusers" else checkpoint.vae_state_dict(models.vae, torch.float32)
    path = saved(tmp_path / "vae.safetensors", {prefix + key: tensor for key, tensor in tensors.items()})
    assert_same(checkpoint.load_vae(path, **FP32), models.vae)


def test_loaded_models_compute_as_those_written(models: SmallAnima, files: SmallFiles):
    """Up to rounding: products over memory-mapped tensors may start at other addresses."""
    generator = torch.Generator().manual_seed(1)
    ids, times = torch.randint(0, 300, (2, 7), generator=generator), torch.tensor([0.2, 0.9])
    pixels, latents = torch.randn((1, 3, 1, 32, 16), generator=generator), torch.randn((2, 16, 4, 6), generator=generator)
    parts: Any = deepcopy(models.denoiser)  # the wrapper takes its modules over
    vae: Any = checkpoint.load_vae(files.vae, **FP32)
    theirs: Any = models.vae
    encoder, denoiser = checkpoint.load_text_encoder(files.qwen3, **FP32), checkpoint.load_denoiser(files.dit, **FP32)
    expected = AnimaDiT(parts["transformer"], parts["text_conditioner"]).eval()
    states, mask = models.text_encoder(ids).last_hidden_state, torch.ones_like(ids)
    text = expected.condition(states, mask, ids, mask)
    for answer, wanted in (
        (encoder(ids).last_hidden_state, states),
        (vae.encode(pixels).latent_dist.mode(), theirs.encode(pixels).latent_dist.mode()),
        (vae.decode(latents.unsqueeze(2)).sample, theirs.decode(latents.unsqueeze(2)).sample),
        (denoiser.condition(states, mask, ids, mask), text),
        (denoiser(latents, times, text), expected(latents, times, text)),
    ):
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)


def test_writing_the_loaded_models_gives_the_files_again(files: SmallFiles):
    again = {
        files.dit: checkpoint.denoiser_state_dict(checkpoint.load_denoiser(files.dit, **FP32), torch.float32),
        files.qwen3: checkpoint.text_encoder_state_dict(checkpoint.load_text_encoder(files.qwen3, **FP32), torch.float32),
        files.vae: checkpoint.vae_state_dict(checkpoint.load_vae(files.vae, **FP32), torch.float32),
    }
    for path, tensors in again.items():
        stored = load_tensors(path)
        assert tensors.keys() == stored.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_tensors_are_cast_from_any_stored_precision(models: SmallAnima, tmp_path: Path, stored: torch.dtype):
    path = saved(tmp_path / "dit.safetensors", checkpoint.denoiser_state_dict(models.denoiser, stored))
    loaded = checkpoint.load_denoiser(path, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = models.denoiser.get_parameter("transformer.proj_out.weight").to(stored).to(torch.bfloat16)
    assert torch.equal(loaded.get_parameter("transformer.proj_out.weight"), expected)


def test_models_come_frozen_in_eval_mode_with_real_buffers_in_float32(models: SmallAnima, files: SmallFiles):
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU}
    loaded = (
        checkpoint.load_denoiser(files.dit, **half),
        checkpoint.load_text_encoder(files.qwen3, **half),
        checkpoint.load_vae(files.vae, **half),
    )
    for module in loaded:
        assert not module.training and not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    for module, source in zip(loaded, (models.denoiser, models.text_encoder, models.vae), strict=True):
        expected = dict(source.named_buffers())
        assert all(torch.equal(buffer, expected[name]) for name, buffer in module.named_buffers() if name in expected)
    assert "rotary_emb.inv_freq" in dict(loaded[1].named_buffers())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("net.blocks.0.self_attn._extra_state", torch.uint8),
        ("net.accum_video_sample_counter", torch.int64),
        ("net.accum_train_in_hours", torch.float32),
        ("net.pos_embedder.seq", torch.float32),
        ("net.pos_embedder.dim_spatial_range", torch.float32),
        ("net.llm_adapter.rotary_emb.inv_freq", torch.float32),
    ],
)
def test_tensors_that_carry_nothing_are_ignored(files: SmallFiles, tmp_path: Path, name: str, dtype: torch.dtype):
    path = saved(tmp_path / "dit.safetensors", load_tensors(files.dit) | {name: torch.zeros(3, dtype=dtype)})
    assert_same(checkpoint.load_denoiser(path, **FP32), checkpoint.load_denoiser(files.dit, **FP32))


def test_averaged_weights_of_a_training_checkpoint_are_ignored_with_a_word(files: SmallFiles, tmp_path: Path, caplog: Any):
    tensors = load_tensors(files.dit)
    averages = {key.replace("net.", "net_ema.", 1): tensor + 1 for key, tensor in tensors.items()}
    assert_same(
        checkpoint.load_denoiser(saved(tmp_path / "dit.safetensors", tensors | averages), **FP32),
        checkpoint.load_denoiser(files.dit, **FP32),
    )
    assert [record.getMessage() for record in caplog.records] == ["the tensors under 'net_ema.' of the checkpoint are ignored"]


def test_the_head_of_a_language_model_is_left_out(models: SmallAnima, tmp_path: Path):
    tensors = {f"model.{key}": tensor for key, tensor in models.text_encoder.state_dict().items()}
    path = saved(tmp_path / "qwen3.safetensors", tensors | {"lm_head.weight": torch.zeros(320, 32)})
    assert_same(checkpoint.load_text_encoder(path, **FP32), models.text_encoder)


def test_a_file_of_all_models_gives_each_of_them(models: SmallAnima, tmp_path: Path, caplog: Any):
    whole = checkpoint.denoiser_state_dict(models.denoiser, torch.float32, "model.diffusion_model.")
    whole |= {f"vae.{key}": tensor for key, tensor in checkpoint.vae_state_dict(models.vae, torch.float32).items()}
    whole |= {f"text_encoders.qwen3_06b.transformer.model.{key}": tensor for key, tensor in models.text_encoder.state_dict().items()}
    path = saved(tmp_path / "whole.safetensors", whole)
    assert_same(checkpoint.load_denoiser(path, **FP32), models.denoiser)
    assert_same(checkpoint.load_text_encoder(path, **FP32), models.text_encoder)
    assert_same(checkpoint.load_vae(path, **FP32), models.vae)
    assert "only its transformer is used, not its" in caplog.records[0].getMessage()


# The llm adapter


def _adapter(models: SmallAnima, prefix: str, plus: float = 0.0) -> dict[str, Tensor]:
    return {prefix + key: tensor + plus for key, tensor in models.denoiser.get_submodule("text_conditioner").state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "llm_adapter.", "net.llm_adapter.", "model.diffusion_model.llm_adapter."])
def test_a_given_llm_adapter_replaces_the_one_inside(models: SmallAnima, files: SmallFiles, tmp_path: Path, prefix: str):
    other = saved(tmp_path / "adapter.safetensors", _adapter(models, prefix, plus=1.0))
    replaced, kept = (checkpoint.load_denoiser(files.dit, **FP32, llm_adapter=path) for path in (other, None))
    assert_same(replaced.transformer, kept.transformer)
    conditioner = kept.text_conditioner.state_dict()
    assert all(torch.equal(tensor, conditioner[key] + 1) for key, tensor in replaced.text_conditioner.state_dict().items())


def test_a_dit_without_llm_adapter_takes_that_of_another_dit_or_folder(models: SmallAnima, files: SmallFiles, tmp_path: Path):
    bare = {key: tensor for key, tensor in load_tensors(files.dit).items() if "llm_adapter" not in key}
    path = saved(tmp_path / "bare.safetensors", bare)
    models.denoiser.get_submodule("text_conditioner").save_pretrained(tmp_path / "text_conditioner")  # pyright: ignore[reportCallIssue]
    for source in (files.dit, tmp_path, tmp_path / "text_conditioner"):
        assert_same(checkpoint.load_denoiser(path, **FP32, llm_adapter=source), models.denoiser)


@pytest.mark.parametrize("prefix", ["", "model.", "net."])
def test_the_llm_adapter_of_a_whole_dit_is_taken_under_every_prefix(models: SmallAnima, files: SmallFiles, tmp_path: Path, prefix: str):
    whole = {prefix + key.removeprefix("net."): tensor for key, tensor in load_tensors(files.dit).items()}
    path = saved(tmp_path / "whole.safetensors", whole)
    assert_same(checkpoint.load_denoiser(files.dit, **FP32, llm_adapter=path), models.denoiser)


def test_a_dit_without_llm_adapter_asks_for_one(files: SmallFiles, tmp_path: Path):
    bare = {key: tensor for key, tensor in load_tensors(files.dit).items() if "llm_adapter" not in key}
    with pytest.raises(
        ValueError,
        match=r"bare\.safetensors: has no llm adapter \(no tensor under 'net\.llm_adapter\.'\); give one with --llm_adapter_path",
    ):
        checkpoint.load_denoiser(saved(tmp_path / "bare.safetensors", bare), **FP32)


# Other sizes

UNEVEN = math.nextafter(61 / 28, 3)  # int(28 * (61 / 28)) is 60
SIZE: dict[str, Any] = {
    "in_channels": 17, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "mlp_ratio": 2.0,
    "text_embed_dim": 24, "adaln_lora_dim": 8, "concat_padding_mask": False, "extra_pos_embed_type": None,
}  # fmt: skip
ADAPTER_SIZE: dict[str, Any] = {
    "source_dim": 32, "target_dim": 24, "model_dim": 24, "num_layers": 1, "num_attention_heads": 2, "target_vocab_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("transformer", "conditioner"),
    [
        ({"num_layers": 3}, {"num_layers": 3}),
        ({"num_attention_heads": 3, "adaln_lora_dim": 4}, {"num_attention_heads": 3}),
        ({"attention_head_dim": 14, "mlp_ratio": UNEVEN}, {"model_dim": 28, "mlp_ratio": UNEVEN}),
        ({}, {"model_dim": 16}),
        ({}, {"use_self_attention": False}),
        ({}, {"use_layer_norm": True}),
    ],
    ids=str,
)
def test_denoisers_of_other_sizes_load_by_the_same_rules(tmp_path: Path, transformer: dict[str, Any], conditioner: dict[str, Any]):
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    torch.manual_seed(0)
    parts = {
        "transformer": CosmosTransformer3DModel(**SIZE | transformer),
        "text_conditioner": AnimaTextConditioner(**ADAPTER_SIZE | conditioner),
    }
    denoiser = nn.ModuleDict(parts)
    path = saved(tmp_path / "dit.safetensors", checkpoint.denoiser_state_dict(denoiser, torch.float32))
    assert_same(checkpoint.load_denoiser(path, **FP32), denoiser)


@pytest.mark.parametrize(
    "size",
    [
        {"num_res_blocks": 2},
        {"base_dim": 4, "dim_mult": [2, 2, 4, 8]},
        {"temperal_downsample": [True, False, False]},
        {"input_channels": 4},
    ],
    ids=str,
)
def test_vaes_of_other_sizes_load_by_the_same_rules(tmp_path: Path, size: dict[str, Any]):
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    torch.manual_seed(0)
    config: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1} | size
    vae = AutoencoderKLQwenImage(**config)
    for name, tensors in (("original", checkpoint.vae_state_dict(vae, torch.float32)), ("diffusers", vae.state_dict())):
        assert_same(checkpoint.load_vae(saved(tmp_path / f"{name}.safetensors", tensors), **FP32), vae)
