"""Anima in diffusers layout: folders of all models or of one, whole or in shards, as diffusers and transformers write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_anima import SmallAnima, SmallFiles, build_small_anima, write_small_anima

from library.core.tensor_file import load_tensors, save_tensors
from library.models.anima.checkpoint import load_denoiser, load_text_encoder, load_vae

FP32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def models() -> SmallAnima:
    return build_small_anima()


@pytest.fixture(scope="module")
def files(models: SmallAnima, tmp_path_factory: pytest.TempPathFactory) -> SmallFiles:
    return write_small_anima(tmp_path_factory.mktemp("anima"), models)


@pytest.fixture
def folder(models: SmallAnima, tmp_path: Path) -> Path:
    """All models as diffusers and transformers save them."""
    parts: dict[str, Any] = {**dict(models.denoiser.named_children()), "text_encoder": models.text_encoder, "vae": models.vae}
    for name, module in parts.items():
        module.save_pretrained(tmp_path / name)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


def test_a_folder_gives_the_models_of_the_single_files(models: SmallAnima, folder: Path):
    assert_same(load_denoiser(folder, **FP32), models.denoiser)
    for place in (folder, folder / "text_encoder"):
        assert_same(load_text_encoder(place, **FP32), models.text_encoder)
    for place in (folder, folder / "vae"):
        assert_same(load_vae(place, **FP32), models.vae)


def test_a_transformer_that_counts_its_mask_apart_computes_as_the_single_file(files: SmallFiles, folder: Path):
    change_config(folder / "transformer", in_channels=16, concat_padding_mask=True, max_size=[128, 240, 240])
    denoisers = load_denoiser(folder, **FP32), load_denoiser(files.dit, **FP32)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn((1, 16, 4, 6), generator=generator), torch.randn((1, 5, 24), generator=generator)
    velocities = [denoiser(latents, torch.tensor([0.5]), text) for denoiser in denoisers]
    torch.testing.assert_close(*velocities, rtol=1e-5, atol=1e-5)
    assert denoisers[0].transformer.rope.max_size == denoisers[1].transformer.rope.max_size


def test_a_causal_language_model_in_shards_loads(models: SmallAnima, folder: Path):
    whole = folder / "text_encoder" / "model.safetensors"
    tensors = [(f"model.{key}", tensor) for key, tensor in load_tensors(whole).items()]
    tensors.append(("lm_head.weight", torch.zeros(2, 2)))
    whole.unlink()
    for n, part in enumerate((tensors[:9], tensors[9:]), start=1):
        save_tensors(whole.with_name(f"model-{n:05d}-of-00002.safetensors"), dict(part))
    change_config(folder / "text_encoder", architectures=["Qwen3ForCausalLM"])
    assert_same(load_text_encoder(folder, **FP32), models.text_encoder)


def test_an_encoder_s_folder_says_what_no_shape_tells(folder: Path):
    change_config(folder / "text_encoder", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    encoder: Any = load_text_encoder(folder, **FP32)
    assert encoder.config.rope_parameters["rope_theta"] == 500.0


def test_a_vae_s_folder_says_how_its_latents_are_normalised(folder: Path):
    change_config(folder / "vae", latents_mean=[0.5] * 16)
    vae: Any = load_vae(folder, **FP32)
    assert vae.config.latents_mean == [0.5] * 16


def test_a_folder_without_conditioner_takes_a_given_llm_adapter(models: SmallAnima, files: SmallFiles, folder: Path):
    (folder / "text_conditioner" / "config.json").unlink()
    assert_same(load_denoiser(folder, **FP32, llm_adapter=files.dit), models.denoiser)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"_class_name": "QwenImageTransformer2DModel"}, "is a QwenImage.*; the transformer of Anima is a Cosmos"),
        ("transformer", {"num_layers": 3}, r"transformer: .* missing tensors: transformer_blocks\.2\."),
        ("transformer", {"_name_or_path": "x", "extra_pos_embed_type": "learnable"}, None),
        ("text_conditioner", {"target_dim": 20}, r"misshapen tensors: embed\.weight \[\d+, 24\] for \[\d+, 20\]"),
    ],
)  # fmt: skip
def test_a_folder_of_another_configuration_is_refused(folder: Path, part: str, changes: dict[str, Any], said: str | None):
    change_config(folder / part, **changes)
    if said is None:  # what Anima's transformer never has is not believed
        assert "learnable_pos_embed" not in dict(load_denoiser(folder, **FP32).transformer.named_modules())
        return
    with pytest.raises(ValueError, match=said):
        load_denoiser(folder, **FP32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, r"config\.json: is a AutoencoderKL; the VAE of Anima is a AutoencoderKLQwenImage"),
        ({"z_dim": 48}, "has 48 latent channels at 1/8 of the size; Anima's has 16 at 1/8"),
        ({"dim_mult": [1, 2, 4], "temperal_downsample": [False, True]}, "has 16 latent channels at 1/4 of the size"),
    ],
)
def test_a_folder_of_another_vae_is_refused(folder: Path, changes: dict[str, Any], said: str):
    change_config(folder / "vae", **changes)
    with pytest.raises(ValueError, match=said):
        load_vae(folder, **FP32)


@pytest.mark.parametrize(("part", "changes"), [("transformer", {"num_layers": "a"}), ("text_encoder", {"hidden_size": "x"})])
def test_a_configuration_that_its_class_cannot_take_is_named(folder: Path, part: str, changes: dict[str, Any]):
    change_config(folder / part, **changes)
    said = rf"{part}: not a complete .*\n.* cannot be made as .*{part}.config\.json says: "
    with pytest.raises(ValueError, match=said):
        (load_denoiser if part == "transformer" else load_text_encoder)(folder, **FP32)


def test_what_a_folder_lacks_is_named(folder: Path):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vae: has no safetensors file of weights \(diffusion_pytorch_model\.safetensors"):
        load_vae(folder, **FP32)
    (folder / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"text_encoder.config\.json: not valid JSON"):
        load_text_encoder(folder, **FP32)
    with pytest.raises(ValueError, match=r"transformer.config\.json: no such file; an Anima folder .* has transformer, text_conditioner"):
        load_denoiser(folder / "vae", **FP32)
