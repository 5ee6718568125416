"""The training run end to end, on a tiny random SDXL."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.core.tensor_file import load_tensors, read_header
from library.models.architecture import architecture_named
from library.training.not_yet import NOT_YET
from library.training.run import RunResult, option_groups, train

SDXL = architecture_named("sdxl")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, (width, height) in enumerate([(64, 64), (64, 64), (96, 64), (64, 96), (64, 64)]):
        Image.effect_noise((width, height), 40 + index).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {('cat', 'dog')[index % 2]}, red")
    (folder / "dataset.toml").write_text(
        "[general]\nresolution = [96, 64]\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 32\n"
        f"[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder}'\nflip_aug = true\n"
    )
    return folder


def options(model: Path, images: Path, output: Path, *extra: str, module: str = "networks.loha") -> OptionSet:
    argv = [
        "--pretrained_model_name_or_path", str(model), "--dataset_config", str(images / "dataset.toml"), "--output_dir", str(output),
        "--output_name", "net", "--network_module", module, "--network_dim", "2", "--seed", "1", "--learning_rate", "1e-2",
        "--max_data_loader_n_workers", "0", *extra,
    ]  # fmt: skip
    return parse_command_line(option_groups(SDXL), argv, prog="test", about="test", refuse=NOT_YET)


def run(model: Path, images: Path, output: Path, *extra: str, module: str = "networks.loha") -> RunResult:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one state a process; a script starts anew for each run
    return train(SDXL, options(model, images, output, *extra, module=module))


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr"])
def test_every_network_module_trains_and_saves(module: str, small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    result = run(small_sdxl_file, images, tmp_path, "--max_train_steps", "4", "--cache_latents", module=module)
    tensors = load_tensors(result.file)
    assert len(result.losses) == 4
    assert any(name.startswith("lora_unet_") for name in tensors) and any(name.startswith("lora_te1_text_model_") for name in tensors)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    moved = ("lora_up.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b")  # start at zero
    started = [tensor for name, tensor in tensors.items() if name.endswith(moved) and "lora_te1_text_model_encoder_layers_2" not in name]
    assert started and all(tensor.abs().max() > 0 for tensor in started)


def test_the_log_says_once_which_ways_the_deltas_took(
    small_sdxl_file: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small_sdxl_file, images, tmp_path, "--max_train_steps", "2", "--network_args", "path=materialise", "conv_dim=2")
    (ways,) = re.findall(r"ways to the deltas, and of how many layers: (.*)", capsys.readouterr().err)
    assert re.fullmatch(r"LoHa materialise [1-9]\d*", ways.strip())


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr"])
def test_all_extras_train_together_and_files_hold_no_scalar(module: str, small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["conv_dim=2", "use_tucker=True", "use_scalar=True", "dora_wd=True", "rs_lora=True", "rank_dropout=0.1"]
    result = run(small_sdxl_file, images, tmp_path, "--max_train_steps", "3", "--network_args", *arguments, module=module)
    tensors = load_tensors(result.file)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert not any(name.endswith(".scalar") for name in tensors) and any(name.endswith(".dora_scale") for name in tensors)
    again = run(
        small_sdxl_file, images, tmp_path / "again", "--max_train_steps", "1",
        "--network_weights", str(result.file), "--network_args", *arguments, module=module,
    )  # fmt: skip
    assert read_header(again.file).tensors.keys() == tensors.keys()


def test_wrong_network_arguments_are_said_before_a_model_is_loaded(images: Path, tmp_path: Path) -> None:
    extra = ["--network_args", "conv_dimm=3", "rank_dropout=2", "loraplus_targets=x", "train_llm_adapter=True"]
    with pytest.raises(OptionError) as caught:
        run(tmp_path / "absent.safetensors", images, tmp_path, *extra)
    text = str(caught.value)
    assert "did you mean 'conv_dim'?" in text and "rank_dropout=2.0" in text and "SDXL has no such layers" in text


def test_dora_starts_from_the_weights_that_fp8_has_rounded(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    extra = ["--fp8_base", "--mixed_precision", "bf16", "--network_train_unet_only", "--max_train_steps", "1", "--learning_rate", "1e-12"]
    result = run(small_sdxl_file, images, tmp_path, *extra, "--network_args", "dora_wd=True", module="networks.lora")
    path = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    weight = load_tensors(small_sdxl_file)[f"model.diffusion_model.{path}.weight"].to(torch.bfloat16).to(torch.float8_e4m3fn).float()
    found = load_tensors(result.file)[f"lora_unet_{path.replace('.', '_')}.dora_scale"].float()
    torch.testing.assert_close(found.flatten(), weight.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_norms_of_deltas_stay_within_scale_weight_norms(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    result = run(small_sdxl_file, images, tmp_path, "--max_train_steps", "4", "--scale_weight_norms", "0.01", module="networks.lora")
    tensors = load_tensors(result.file)
    names = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    norms = [
        float((tensors[f"{name}.lora_up.weight"].flatten(1) @ tensors[f"{name}.lora_down.weight"].flatten(1)).norm() / 2) for name in names
    ]
    assert max(norms) == pytest.approx(0.01, rel=1e-4)
    assert read_header(result.file).metadata["ss_scale_weight_norms"] == "0.01"


def test_training_lowers_the_loss(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    result = run(small_sdxl_file, images, tmp_path, "--max_train_epochs", "20", "--cache_latents", "--unet_lr", "2e-2")
    first, last = sum(result.losses[:10]) / 10, sum(result.losses[-10:]) / 10
    assert last < 0.95 * first


def test_the_same_seed_gives_the_same_bytes_with_and_without_caches_and_workers(
    small_sdxl_file: Path, images: Path, tmp_path: Path
) -> None:
    ways = {"plain": [], "cached": ["--cache_latents"], "workers": ["--max_data_loader_n_workers", "2"]}
    ways["persistent"] = [*ways["workers"], "--persistent_data_loader_workers"]
    losses = {way: run(small_sdxl_file, images, tmp_path / way, "--max_train_epochs", "2", *extra).losses for way, extra in ways.items()}
    assert losses["plain"] == losses["workers"] == losses["persistent"]
    torch.testing.assert_close(torch.tensor(losses["plain"]), torch.tensor(losses["cached"]), rtol=1e-4, atol=1e-5)  # VAE batches differ
    first, second = (load_tensors(tmp_path / way / "net.safetensors") for way in ("plain", "workers"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_another_seed_gives_another_run(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    losses = [run(small_sdxl_file, images, tmp_path / seed, "--max_train_steps", "2", "--seed", seed).losses for seed in ("1", "2")]
    assert losses[0] != losses[1]


def test_gradient_checkpointing_changes_no_loss(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    plain = run(small_sdxl_file, images, tmp_path / "a", "--max_train_steps", "3").losses
    checkpointed = run(small_sdxl_file, images, tmp_path / "b", "--max_train_steps", "3", "--gradient_checkpointing").losses
    assert plain == pytest.approx(checkpointed, rel=1e-5)


def test_accumulation_counts_optimizer_steps(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    result = run(small_sdxl_file, images, tmp_path, "--max_train_epochs", "2", "--gradient_accumulation_steps", "3")
    assert len(result.losses) == 4  # 4 batches an epoch: steps of 3 and 1
    assert read_header(result.file).metadata["ss_steps"] == "4"


@pytest.mark.parametrize(("flag", "present", "absent"), [
    ("--network_train_unet_only", "lora_unet_", "lora_te"), ("--network_train_text_encoder_only", "lora_te1_", "lora_unet_"),
])  # fmt: skip
def test_one_side_only(flag: str, present: str, absent: str, small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    names = read_header(run(small_sdxl_file, images, tmp_path, "--max_train_steps", "1", flag).file).tensors
    assert any(name.startswith(present) for name in names) and not any(name.startswith(absent) for name in names)


def test_cached_text_gives_the_losses_of_uncached_text(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    common = ["--max_train_steps", "3", "--network_train_unet_only"]
    plain = run(small_sdxl_file, images, tmp_path / "a", *common).losses
    cached = run(small_sdxl_file, images, tmp_path / "b", *common, "--cache_text_encoder_outputs").losses
    assert plain == pytest.approx(cached, rel=1e-5)


def test_epochs_and_steps_are_saved_and_rotated(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    run(
        small_sdxl_file, images, tmp_path, "--max_train_epochs", "3", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1",
        "--save_every_n_steps", "4", "--save_precision", "fp16",
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net-000002.safetensors", "net-step00000004.safetensors", "net-step00000008.safetensors", "net.safetensors",
    ]  # fmt: skip
    tensors = read_header(tmp_path / "net.safetensors").tensors
    assert {info.dtype for name, info in tensors.items() if not name.endswith("alpha")} == {"F16"}
    assert {info.dtype for name, info in tensors.items() if name.endswith("alpha")} == {"F32"}


def test_metadata_says_how_the_file_was_made(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    extra = ["--network_args", "conv_dim=2", "--optimizer_args", "weight_decay=0.1", "--metadata_author", "me"]
    metadata = read_header(run(small_sdxl_file, images, tmp_path, "--max_train_steps", "1", *extra).file).metadata
    expected = {
        "ss_network_module": "networks.loha", "ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_base_model_version": "sdxl_base_v1-0",
        "ss_seed": "1", "ss_learning_rate": "0.01", "ss_steps": "1", "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_num_train_images": "5", "ss_v2": "False", "ss_clip_skip": "None", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon", "modelspec.author": "me", "modelspec.title": "net", "ss_output_name": "net",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2"}
    assert len(metadata["sshs_model_hash"]) == 64 and len(metadata["sshs_legacy_hash"]) == 8
    assert "ss_tag_frequency" in metadata


def test_no_metadata_keeps_what_loading_needs(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    metadata = read_header(run(small_sdxl_file, images, tmp_path, "--max_train_steps", "1", "--no_metadata").file).metadata
    assert "ss_network_module" in metadata and "ss_seed" not in metadata


def test_a_run_starts_from_network_weights(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    first = run(small_sdxl_file, images, tmp_path / "a", "--max_train_steps", "4").file
    for extra in ([], ["--dim_from_weights"]):
        again = run(
            small_sdxl_file,
            images,
            tmp_path / "b",
            "--max_train_steps",
            "1",
            "--network_weights",
            str(first),
            "--learning_rate",
            "1e-12",
            *extra,
        )
        before, after = load_tensors(first), load_tensors(again.file)
        assert before.keys() == after.keys()
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_base_weights_are_merged_first(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    first = run(small_sdxl_file, images, tmp_path / "a", "--max_train_steps", "6").file
    plain = run(small_sdxl_file, images, tmp_path / "b", "--max_train_steps", "1").losses
    merged = run(small_sdxl_file, images, tmp_path / "c", "--max_train_steps", "1", "--base_weights", str(first)).losses
    nothing = run(
        small_sdxl_file, images, tmp_path / "d", "--max_train_steps", "1", "--base_weights", str(first), "--base_weights_multiplier", "0"
    ).losses
    assert merged != pytest.approx(plain, rel=1e-6) and nothing == pytest.approx(plain, rel=1e-6)


def test_base_weights_change_cached_text_too(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    first = run(small_sdxl_file, images, tmp_path / "a", "--max_train_steps", "6", "--network_train_text_encoder_only").file
    common = ["--max_train_steps", "2", "--network_train_unet_only", "--base_weights", str(first)]
    plain = run(small_sdxl_file, images, tmp_path / "b", *common).losses
    cached = run(small_sdxl_file, images, tmp_path / "c", *common, "--cache_text_encoder_outputs").losses
    without = run(small_sdxl_file, images, tmp_path / "d", *common[:3]).losses
    assert plain == pytest.approx(cached, rel=1e-5) and plain != pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("extra", [["--mixed_precision", "bf16"], ["--mixed_precision", "bf16", "--fp8_base", "--gradient_checkpointing"]])
def test_half_precision_trains(extra: list[str], small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    plain = run(small_sdxl_file, images, tmp_path / "a", "--max_train_steps", "2").losses
    half = run(small_sdxl_file, images, tmp_path / "b", "--max_train_steps", "2", *extra).losses
    assert half == pytest.approx(plain, rel=0.1)


def test_tensorboard_gets_the_losses(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    result = run(small_sdxl_file, images, tmp_path, "--max_train_steps", "3", "--logging_dir", str(logs))
    events = next(path for path in logs.rglob("events*") if path.stat().st_size > 0)
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    assert [event.value for event in reader.Scalars("loss/current")] == pytest.approx(result.losses, rel=1e-5)
    assert "lr/unet" in reader.Tags()["scalars"]


BAD = [
    (["--network_dim", "0"], "--network_dim 0: must be at least 1"),
    (["--network_args", "rank_dropuot=0.1"], "did you mean 'rank_dropout'"),
    (["--optimizer_type", "adamw9bit"], "did you mean 'AdamW8bit'"),
    (["--network_modul", "x"], "did you mean '--network_module'"),
    (["--fp8_base"], "needs --mixed_precision bf16 or fp16"),
    (["--cache_text_encoder_outputs"], "add --network_train_unet_only"),
    (["--save_last_n_steps", "3"], "no effect without --save_every_n_steps"),
    (["--network_module", "networks.lokar"], "did you mean 'networks.lokr'"),
    (["--resolution", "60", "--dataset_config", "none"], "--dataset_config"),
    (["--output_dir", "/proc/none"], "--output_dir /proc/none: cannot write there"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=[" ".join(extra) for extra, _ in BAD])
def test_a_mistake_is_answered_with_what_would_work(
    extra: list[str], message: str, small_sdxl_file: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        run(small_sdxl_file, images, tmp_path, "--max_train_steps", "1", *extra)
    assert message in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss became (nan|inf) at step \d+ with the images .*png"):
        run(small_sdxl_file, images, tmp_path, "--max_train_steps", "30", "--learning_rate", "1e30", "--max_grad_norm", "0")
    assert not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_is_named_without_a_traceback(workers: str, small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes((images / "0.png").read_bytes()[:2000])
    (folder / "broken.txt").write_text("a cat")
    (folder / "dataset.toml").write_text(f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    with pytest.raises(ValueError) as caught:
        run(small_sdxl_file, folder, tmp_path / "out", "--max_train_steps", "1", "--max_data_loader_n_workers", workers)
    assert "broken.png" in str(caught.value) and "\n" not in str(caught.value)
