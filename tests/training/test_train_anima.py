"""What a run on Anima has of its own: names, metadata, its noise, its options."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from small_family import SmallFamily

from library.core.tensor_file import load_tensors, read_header
from networks.network import Network


def test_metadata_says_flow_and_how_places_were_drawn(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    extra = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3", "--no_half_vae"]
    metadata = read_header(anima.run(images, tmp_path, "--max_train_steps", "1", *extra).file).metadata
    expected = {
        "ss_base_model_version": "anima", "ss_timestep_sampling": "shift", "ss_discrete_flow_shift": "3.0", "ss_sigmoid_scale": "1.0",
        "ss_weighting_scheme": "uniform", "ss_logit_mean": "0.0", "ss_logit_std": "1.0", "ss_mode_scale": "1.29",
        "ss_sd_model_name": "dit.safetensors", "ss_vae_name": "vae.safetensors",
        "modelspec.architecture": "anima-preview/lora", "modelspec.prediction_type": "flow",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected


def test_sd_scripts_own_name_for_lora_on_anima_trains_a_lora(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    given = ["--max_train_steps", "2", "--network_args", "verbose=True", "exclude_patterns=['.*cross_attn.*']"]
    ours = anima.run(images, tmp_path / "a", *given, module="networks.lora")
    theirs = anima.run(images, tmp_path / "b", *given, module="networks.lora_anima")
    shapes = [{name: (info.dtype, info.shape) for name, info in read_header(run.file).tensors.items()} for run in (ours, theirs)]
    assert theirs.losses == ours.losses and shapes[0] == shapes[1]
    assert read_header(theirs.file).metadata["ss_network_module"] == "networks.lora_anima"


@pytest.mark.parametrize(
    "extra",
    [
        ["--timestep_sampling", "uniform", "--weighting_scheme", "cosmap"],
        ["--timestep_sampling", "flux_shift", "--min_timestep", "100"],
        ["--timestep_sampling", "sigma", "--weighting_scheme", "logit_normal"],
        ["--timestep_sampling", "sigma", "--weighting_scheme", "mode"],
        ["--weighting_scheme", "sigma_sqrt"],
    ],
    ids=" ".join,
)
def test_every_way_to_draw_places_gives_a_loss_of_its_own(extra: list[str], anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = anima.run(images, tmp_path / "a", "--max_train_steps", "1", "--cache_latents").losses
    other = anima.run(images, tmp_path / "b", "--max_train_steps", "1", "--cache_latents", *extra).losses
    assert other != pytest.approx(plain, rel=1e-4) and torch.isfinite(torch.tensor(other)).all()


def test_the_llm_adapter_is_adapted_when_asked_also_with_cached_text(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    given = ["--max_train_steps", "3", "--network_train_unet_only", "--network_args", "train_llm_adapter=True"]
    cached = anima.run(images, tmp_path / "a", *given, "--cache_text_encoder_outputs")
    plain = anima.run(images, tmp_path / "b", *given)
    moved = [tensor for name, tensor in load_tensors(cached.file).items() if "llm_adapter_" in name and name.endswith("hada_w2_a")]
    assert len(moved) == 2 * 10 and all(tensor.abs().max() > 0 for tensor in moved)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-4)


def test_dropped_captions_are_dropped_in_training_not_in_the_cache(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    given = ["--max_train_steps", "4", "--network_train_unet_only", "--cache_latents", "--caption_dropout_rate", "0.5"]
    plain = anima.run(images, tmp_path / "a", *given).losses
    cached = anima.run(images, tmp_path / "b", *given, "--cache_text_encoder_outputs").losses
    kept = anima.run(images, tmp_path / "c", *given[:-1], "0", "--cache_text_encoder_outputs").losses
    assert plain == pytest.approx(cached, rel=1e-4) and plain != pytest.approx(kept, rel=1e-4)


def test_the_text_encoder_is_trained_through_the_adapter(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    result = anima.run(images, tmp_path, "--max_train_steps", "3", "--network_train_text_encoder_only", "--gradient_checkpointing")
    moved = [tensor for name, tensor in load_tensors(result.file).items() if name.endswith("hada_w2_a")]
    assert len(moved) == 2 * 7 and all(tensor.abs().max() > 0 for tensor in moved)


def test_a_trained_file_changes_the_model_it_is_loaded_into(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    file = anima.run(images, tmp_path, "--max_train_steps", "3", module="networks.lokr").file
    arch, options = anima.arch, anima.options(images, tmp_path)
    models = arch.load(options[arch.ModelOptions], device=torch.device("cpu"), dtype=torch.float32)
    tokens = arch.tokenize(models.tokenizers, ["a cat", ""], options[arch.ModelOptions])
    latents, times = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            text = arch.encode_text(models.text_encoders, tokens)
            return arch.predict(models.denoiser, latents, times, text, None)  # pyright: ignore[reportArgumentType]

    before = velocity()
    network = Network.from_file(file, models.denoiser, models.text_encoders)
    network.attach()
    applied = velocity()
    network.detach()
    assert torch.equal(velocity(), before)
    network.merge(keep=False)
    assert (applied - before).abs().max() > 1e-3
    torch.testing.assert_close(velocity(), applied, rtol=1e-4, atol=1e-4)


def test_captions_beyond_the_limit_are_counted(
    anima: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anima.run(images, tmp_path, "--max_train_steps", "1", "--qwen3_max_token_length", "3", "--t5_max_token_length", "600")
    assert "5 of 5 captions are longer than the text encoder reads and will be cut, the longest by " in capsys.readouterr().err
    anima.run(images, tmp_path, "--max_train_steps", "1")
    assert "captions are longer" not in capsys.readouterr().err


def test_memory_options_change_no_loss(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = anima.run(images, tmp_path / "a", "--max_train_steps", "2").losses
    saving = ["--gradient_checkpointing", "--vae_chunk_size", "4", "--split_attn", "--attn_mode", "sdpa"]
    assert anima.run(images, tmp_path / "b", "--max_train_steps", "2", *saving).losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("extra", [[], ["--gradient_checkpointing"]], ids=["plain", "checkpointed"])
def test_swapped_blocks_change_no_loss(
    extra: list[str], anima: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated: a CPU as its own device. The hooks, the placing and the adapters on swapped blocks are those of a GPU."""
    plain = anima.run(images, tmp_path / "a", "--max_train_steps", "3", *extra).losses
    monkeypatch.setattr("library.training.memory.options.swap_refusal", lambda device: None)
    swapped = anima.run(images, tmp_path / "b", "--max_train_steps", "3", "--blocks_to_swap", "2", *extra).losses
    assert swapped == plain


BAD = [
    (["--min_snr_gamma", "5"], "--min_snr_gamma: Anima is a flow"),
    (["--self_attn_lr", "1e-4"], "network_reg_lrs="),
    (["--llm_adapter_lr", "1e-4"], "train_llm_adapter=True"),
    (["--max_token_length", "225"], "--qwen3_max_token_length"),
    (["--attn_mode", "sageattn"], "--attn_mode sageattn: it has no backward pass"),
    (["--timestep_sampling", "sigmiod"], "did you mean 'sigmoid'"),
    (["--discrete_flow_shift", "0"], "--discrete_flow_shift 0: must be more than 0"),
    (["--blocks_to_swap", "2"], "no memory of its own to save"),
    (["--network_args", "conv_dim=4"], "conv_dim"),
    (["--qwen3", "nowhere.safetensors"], "nowhere.safetensors"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=[" ".join(extra) for extra, _ in BAD])
def test_a_mistake_with_anima_is_answered_with_what_would_work(
    extra: list[str], message: str, anima: SmallFamily, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        anima.run(images, tmp_path, "--max_train_steps", "1", *extra)
    assert message in str(caught.value)


IN_VAIN = ("--qwen_image_vae_2d", "--vae_disable_cache", "--discrete_flow_shift", "--network_args train_llm_adapter")


def test_what_is_given_in_vain_is_said(anima: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--qwen_image_vae_2d", "--vae_disable_cache", "--discrete_flow_shift", "3", "--network_args", "train_llm_adapter=True"]
    anima.run(images, tmp_path, "--max_train_steps", "1", "--network_train_text_encoder_only", *given)
    said = capsys.readouterr().err
    assert [what for what in IN_VAIN if f"{what} has no effect: " not in said] == []


def test_sides_that_are_no_multiples_of_16_are_refused(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "dataset.toml").write_text(f"[general]\nresolution = 72\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    with pytest.raises(ValueError, match="72"):
        anima.run(folder, tmp_path / "out", "--max_train_steps", "1")


RATES = {"self_attn_lr": "_self_attn_", "cross_attn_lr": "_cross_attn_", "mlp_lr": "_mlp_", "mod_lr": "_adaln_modulation_"}
RATES["llm_adapter_lr"] = "_llm_adapter_"


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rates_of_the_advice_are_taken(name: str, anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    arguments = shlex.split(anima.arch.refused[name].partition(": ")[2].partition(" (")[0])
    result = anima.run(images, tmp_path, "--max_train_steps", "2", "--network_train_unet_only", "--unet_lr", "0", *arguments)
    tensors = {name.partition(".")[0]: tensor for name, tensor in load_tensors(result.file).items() if "hada_w2_a" in name}
    assert {layer for layer, tensor in tensors.items() if tensor.abs().max() > 0} == {layer for layer in tensors if RATES[name] in layer}


@pytest.mark.parametrize("extra", [[], ["--mixed_precision", "bf16", "--gradient_checkpointing"]], ids=["fp32", "bf16"])
def test_every_layer_learns_once_nothing_is_excluded(extra: list[str], anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    arguments = ["--network_args", "include_patterns=['.*']", "train_llm_adapter=True"]
    result = anima.run(images, tmp_path, "--max_train_steps", "2", "--network_train_unet_only", *arguments, *extra)
    moved = {name: tensor.abs().max() > 0 for name, tensor in load_tensors(result.file).items() if name.endswith("hada_w2_a")}
    assert len(moved) == 1 + 2 + 2 * 10 + 2 * 16 + 3 and all(moved.values())
