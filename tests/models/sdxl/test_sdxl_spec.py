"""SDXL as an `Architecture`: loading, images to latents and back, the denoiser's conditions, identity and metadata."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.core.options import Given, OptionError, read_group
from library.core.tensor_file import load_tensors, save_tensors
from library.data.batch import Sizes
from library.models.architecture import Models, architecture_named, architecture_of
from library.models.sdxl.configuration import LATENT_SCALE
from library.models.sdxl.spec import ARCHITECTURE, ModelOptions

CPU = torch.device("cpu")


@pytest.fixture
def options(small_sdxl_file: Path) -> ModelOptions:
    return ModelOptions(pretrained_model_name_or_path=str(small_sdxl_file))


@pytest.fixture
def models(options: ModelOptions) -> Models:
    return ARCHITECTURE.load(options, device=CPU, dtype=torch.float32)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def sizes(**changes: list[int]) -> Sizes:
    numbers = {"original": [1000, 1500], "crop": [3, 5], "target": [832, 1216]} | changes
    return Sizes(**{name: torch.tensor([pair, pair]) for name, pair in numbers.items()})


def test_the_family_is_found_by_name_and_by_its_denoiser(models: Models):
    assert architecture_named("sdxl") is ARCHITECTURE
    assert architecture_of(models.denoiser) is ARCHITECTURE


def test_only_a_u_net_with_size_conditioning_is_recognised(small_sdxl_modules: SimpleNamespace):
    from diffusers import UNet2DConditionModel

    older = UNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None
    )
    assert ARCHITECTURE.recognises(small_sdxl_modules.unet)
    assert not any(ARCHITECTURE.recognises(module) for module in (older, small_sdxl_modules.vae, nn.Linear(2, 2)))


def test_every_part_has_targets_in_the_loaded_models(models: Models):
    for part, module in zip(ARCHITECTURE.parts, [models.denoiser, *models.text_encoders], strict=True):
        targets = ARCHITECTURE.targets(part, module)
        assert {target.group for target in targets} == {*part.default_groups, *part.conv_groups}
        assert all(target.name.startswith(part.prefix + "_") for target in targets)


def test_loaded_models_are_frozen_and_have_the_asked_precision(options: ModelOptions):
    models = ARCHITECTURE.load(options, device=CPU, dtype=torch.bfloat16)
    assert models.vae is not None
    for module in (models.denoiser, *models.text_encoders, models.vae):
        assert not module.training
        assert {(parameter.dtype, parameter.requires_grad) for parameter in module.parameters()} == {(torch.bfloat16, False)}


def test_no_half_vae_keeps_the_vae_in_32_bits(small_sdxl_file: Path):
    options = ModelOptions(pretrained_model_name_or_path=str(small_sdxl_file), no_half_vae=True)
    models = ARCHITECTURE.load(options, device=CPU, dtype=torch.float16)
    assert models.vae is not None
    assert {next(module.parameters()).dtype for module in (models.denoiser, *models.text_encoders)} == {torch.float16}
    assert next(models.vae.parameters()).dtype is torch.float32


# Images


def test_latents_without_generator_are_the_scaled_mode(models: Models, pixels: torch.Tensor):
    vae: Any = models.vae
    latents = ARCHITECTURE.encode_images(vae, pixels, None)
    assert latents.shape == (2, ARCHITECTURE.latent_channels, *(side // ARCHITECTURE.pixels_per_latent for side in pixels.shape[2:]))
    torch.testing.assert_close(latents, vae.encode(pixels).latent_dist.mode() * LATENT_SCALE)


def test_latents_with_a_generator_are_a_sample_that_it_alone_decides(models: Models, pixels: torch.Tensor):
    assert models.vae is not None
    first, again, other = (ARCHITECTURE.encode_images(models.vae, pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_latents_and_pixels_of_a_half_precision_vae_are_float32(options: ModelOptions, pixels: torch.Tensor):
    vae = ARCHITECTURE.load(options, device=CPU, dtype=torch.bfloat16).vae
    assert vae is not None
    latents = ARCHITECTURE.encode_images(vae, pixels, None)
    assert (latents.dtype, ARCHITECTURE.decode_latents(vae, latents).dtype) == (torch.float32, torch.float32)


def test_autocast_does_not_lower_the_precision_of_the_vae(models: Models, pixels: torch.Tensor):
    assert models.vae is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = ARCHITECTURE.encode_images(models.vae, pixels, None)
        decoded = ARCHITECTURE.decode_latents(models.vae, latents)
    assert torch.equal(latents, ARCHITECTURE.encode_images(models.vae, pixels, None))
    assert torch.equal(decoded, ARCHITECTURE.decode_latents(models.vae, latents))


def test_decoding_undoes_the_scale_and_stays_in_range(models: Models):
    vae: Any = models.vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents / LATENT_SCALE).sample.clamp(-1, 1)
    torch.testing.assert_close(ARCHITECTURE.decode_latents(vae, latents), expected)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float16, "--no_half_vae"), (torch.float32, "broken")], ids=str)
def test_latents_that_overflow_are_refused(small_sdxl_file: Path, tmp_path: Path, pixels: torch.Tensor, dtype: torch.dtype, advice: str):
    tensors = load_tensors(small_sdxl_file)
    tensors["first_stage_model.quant_conv.bias"].fill_(float("inf"))
    save_tensors(tmp_path / "hot.safetensors", tensors)
    options = ModelOptions(
        pretrained_model_name_or_path=str(tmp_path / "hot.safetensors"), tokenizer=str(small_sdxl_file.with_name("small.tokenizer"))
    )
    vae = ARCHITECTURE.load(options, device=CPU, dtype=dtype).vae
    assert vae is not None
    with pytest.raises(ValueError, match=advice):
        ARCHITECTURE.encode_images(vae, pixels, None)


# The denoiser


def test_predict_conditions_on_text_pooled_and_sizes_in_sdxl_order(models: Models, options: ModelOptions):
    tokens = ARCHITECTURE.tokenize(models.tokenizers, ["a red cat", "a dog"], options)
    text = ARCHITECTURE.encode_text(models.text_encoders, tokens)
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 900])
    numbers = torch.tensor([[1000, 1500, 3, 5, 832, 1216]] * 2)
    conditions = {"text_embeds": text["pooled"], "time_ids": numbers}
    expected = models.denoiser(noisy, timesteps, encoder_hidden_states=text["hidden_states"], added_cond_kwargs=conditions).sample
    assert tuple(text) == ARCHITECTURE.text_keys
    assert torch.equal(ARCHITECTURE.predict(models.denoiser, noisy, timesteps, text, sizes()), expected)


def test_large_sizes_are_not_rounded_in_half_precision(options: ModelOptions):
    models = ARCHITECTURE.load(options, device=CPU, dtype=torch.bfloat16)
    text = {"hidden_states": torch.zeros(2, 77, 192, dtype=torch.bfloat16), "pooled": torch.zeros(2, 128, dtype=torch.bfloat16)}
    noisy = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    one, other = (
        ARCHITECTURE.predict(models.denoiser, noisy, torch.tensor([1, 1]), text, sizes(original=[side, side])) for side in (1025, 1026)
    )
    assert torch.tensor(1025).bfloat16() == torch.tensor(1026).bfloat16()
    assert not torch.equal(one, other)


def test_the_noise_process_predicts_noise_over_1000_steps():
    process = ARCHITECTURE.noise_process()
    latents, noise = torch.ones(2, 4, 2, 2), torch.full((2, 4, 2, 2), 5.0)
    timesteps = torch.tensor([0, 999])
    noisy = process.corrupt(latents, noise, timesteps)
    assert process.prediction_type == "epsilon"
    assert noisy[0].mean() < 1.2 < 4.9 < noisy[1].mean()


# Options, identity, metadata


def test_options_name_the_missing_checkpoint():
    with pytest.raises(OptionError, match="--pretrained_model_name_or_path is required"):
        read_group(ModelOptions, [])


def test_caption_lengths_other_than_whole_chunks_are_refused():
    given = [Given("pretrained_model_name_or_path", "a", "x"), Given("max_token_length", "100", "--max_token_length")]
    with pytest.raises(OptionError, match="--max_token_length"):
        read_group(ModelOptions, given)


def test_a_longer_caption_length_gives_longer_states(models: Models, small_sdxl_file: Path):
    options = ModelOptions(pretrained_model_name_or_path=str(small_sdxl_file), max_token_length=225)
    tokens = ARCHITECTURE.tokenize(models.tokenizers, ["a cat"], options)
    assert ARCHITECTURE.encode_text(models.text_encoders, tokens)["hidden_states"].shape == (1, 227, 192)


def test_weighted_captions_weigh_their_words_and_read_no_states_of_other_tools(models: Models, options: ModelOptions):
    weighted = replace(options, weighted_captions=True)
    plain, weighed = (
        ARCHITECTURE.encode_text(models.text_encoders, ARCHITECTURE.tokenize(models.tokenizers, ["a (cat:1.5)"], each))
        for each in (options, weighted)
    )
    assert not torch.equal(plain["hidden_states"], weighed["hidden_states"])
    assert ARCHITECTURE.overlong(models.tokenizers, ["(cat:1.5) " * 75], weighted) == [0]
    assert ARCHITECTURE.npz_text(models.text_encoders, options) and not ARCHITECTURE.npz_text(models.text_encoders, weighted)


def moved(path: Path, folder: Path, name: str = "moved") -> Path:
    """A copy of the checkpoint and its tokenizer under another name."""
    shutil.copytree(path.with_name("small.tokenizer"), folder / f"{name}.tokenizer")
    return Path(shutil.copyfile(path, folder / f"{name}.safetensors"))


CHANGES = {
    "VAE": (True, False), "text encoder": (False, True), "U-Net": (False, False), "tokenizer": (False, True), "length": (False, True),
    "precision": (True, False), "the same VAE from a file": (False, False),
    "weighting": (False, True),
}  # fmt: skip
"""Of each change: does it renew cached latents, does it renew cached text?"""


@pytest.mark.parametrize(("change", "renews"), CHANGES.items(), ids=CHANGES.keys())
def test_caches_are_renewed_by_what_changes_their_content_alone(
    options: ModelOptions, small_sdxl_file: Path, tmp_path: Path, change: str, renews: tuple[bool, bool]
):
    copy = moved(small_sdxl_file, tmp_path)
    given: dict[str, Any] = {
        "length": {"max_token_length": 150}, "precision": {"no_half_vae": True}, "weighting": {"weighted_captions": True},
    }  # fmt: skip
    more = given.get(change, {"vae": str(small_sdxl_file)} if change == "the same VAE from a file" else {})
    parts = {"VAE": "first_stage_model.quant_conv.bias", "U-Net": "model.diffusion_model.out.2.bias",
             "text encoder": "conditioner.embedders.1.model.ln_final.bias"}  # fmt: skip
    if change in parts:
        tensors = load_tensors(copy)
        tensors[parts[change]] += 1
        save_tensors(copy, tensors)
    if change == "tokenizer":
        vocab = tmp_path / "moved.tokenizer" / "vocab.json"
        vocab.write_text(vocab.read_text().replace('"cat</w>"', '"tac</w>"'))
    changed = ModelOptions(pretrained_model_name_or_path=str(copy), **more)
    pairs = [[getattr(ARCHITECTURE, name)(each) for each in (options, changed)] for name in ("latents_identity", "text_identity")]
    assert tuple(before != after for before, after in pairs) == renews


def test_metadata_names_and_hashes_the_files(small_sdxl_file: Path):
    options = ModelOptions(pretrained_model_name_or_path=str(small_sdxl_file), vae=str(small_sdxl_file), max_token_length=150)
    content = small_sdxl_file.read_bytes()
    whole, short = hashlib.sha256(content).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert ARCHITECTURE.metadata(options) == {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_clip_skip": "None",
        "ss_max_token_length": "150",
        "ss_sd_model_name": "small.safetensors",
        "ss_sd_model_hash": short,
        "ss_new_sd_model_hash": whole,
        "ss_vae_name": "small.safetensors",
        "ss_vae_hash": short,
        "ss_new_vae_hash": whole,
    }
