"""The training run end to end, on a tiny random model of every family."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from small_family import SmallFamily

from library.core.tensor_file import load_tensors, read_header


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr"])
def test_every_network_module_trains_and_saves(module: str, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    result = family.run(images, tmp_path, "--max_train_steps", "4", "--cache_latents", module=module)
    tensors = load_tensors(result.file)
    assert len(result.losses) == 4
    assert all(any(name.startswith(f"{part.prefix}_") for name in tensors) for part in family.arch.parts)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    moved = ("lora_up.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b")  # start at zero
    started = [tensor for name, tensor in tensors.items() if name.endswith(moved) and "lora_te1_text_model_encoder_layers_2" not in name]
    assert started and all(tensor.abs().max() > 0 for tensor in started)


def test_the_log_says_once_which_ways_the_deltas_took(
    family: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family.run(images, tmp_path, "--max_train_steps", "2", "--network_args", "path=materialise")
    (ways,) = re.findall(r"ways to the deltas, and of how many layers: (.*)", capsys.readouterr().err)
    assert re.fullmatch(r"LoHa materialise [1-9]\d*", ways.strip())


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr"])
def test_all_extras_train_together_and_files_hold_no_scalar(module: str, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    convolutions = ["conv_dim=2", "use_tucker=True"] if any(part.conv_groups for part in family.arch.parts) else []
    arguments = [*convolutions, "use_scalar=True", "dora_wd=True", "rs_lora=True", "rank_dropout=0.1"]
    result = family.run(images, tmp_path, "--max_train_steps", "3", "--network_args", *arguments, module=module)
    tensors = load_tensors(result.file)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert not any(name.endswith(".scalar") for name in tensors) and any(name.endswith(".dora_scale") for name in tensors)
    again = family.run(
        images, tmp_path / "again", "--max_train_steps", "1",
        "--network_weights", str(result.file), "--network_args", *arguments, module=module,
    )  # fmt: skip
    assert read_header(again.file).tensors.keys() == tensors.keys()


def test_norms_of_deltas_stay_within_scale_weight_norms(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    result = family.run(images, tmp_path, "--max_train_steps", "4", "--scale_weight_norms", "0.01", module="networks.lora")
    tensors = load_tensors(result.file)
    names = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    norms = [
        float((tensors[f"{name}.lora_up.weight"].flatten(1) @ tensors[f"{name}.lora_down.weight"].flatten(1)).norm() / 2) for name in names
    ]
    assert max(norms) == pytest.approx(0.01, rel=1e-4)
    assert read_header(result.file).metadata["ss_scale_weight_norms"] == "0.01"


def test_training_lowers_the_loss(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    result = family.run(images, tmp_path, "--max_train_epochs", "20", "--cache_latents", "--unet_lr", "2e-2")
    first, last = sum(result.losses[:10]) / 10, sum(result.losses[-10:]) / 10
    assert last < 0.95 * first


def test_the_same_seed_gives_the_same_bytes_with_and_without_caches_and_workers(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    ways = {"plain": [], "cached": ["--cache_latents"], "workers": ["--max_data_loader_n_workers", "2"]}
    ways["persistent"] = [*ways["workers"], "--persistent_data_loader_workers"]
    losses = {way: family.run(images, tmp_path / way, "--max_train_epochs", "2", *extra).losses for way, extra in ways.items()}
    assert losses["plain"] == losses["workers"] == losses["persistent"]
    torch.testing.assert_close(torch.tensor(losses["plain"]), torch.tensor(losses["cached"]), rtol=1e-4, atol=1e-5)  # VAE batches differ
    first, second = (load_tensors(tmp_path / way / "net.safetensors") for way in ("plain", "workers"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_another_seed_gives_another_run(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    losses = [family.run(images, tmp_path / seed, "--max_train_steps", "2", "--seed", seed).losses for seed in ("1", "2")]
    assert losses[0] != losses[1]


def test_gradient_checkpointing_changes_no_loss(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = family.run(images, tmp_path / "a", "--max_train_steps", "3").losses
    checkpointed = family.run(images, tmp_path / "b", "--max_train_steps", "3", "--gradient_checkpointing").losses
    assert plain == pytest.approx(checkpointed, rel=1e-5)


def test_accumulation_counts_optimizer_steps(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    result = family.run(images, tmp_path, "--max_train_epochs", "2", "--gradient_accumulation_steps", "3")
    assert len(result.losses) == 4  # 4 batches an epoch: steps of 3 and 1
    assert read_header(result.file).metadata["ss_steps"] == "4"


@pytest.mark.parametrize(("flag", "on_denoiser"), [("--network_train_unet_only", True), ("--network_train_text_encoder_only", False)])
def test_one_side_only(flag: str, on_denoiser: bool, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    names = read_header(family.run(images, tmp_path, "--max_train_steps", "1", flag).file).tensors
    adapted = {part.is_denoiser for part in family.arch.parts for name in names if name.startswith(f"{part.prefix}_")}
    assert adapted == {on_denoiser}


def test_cached_text_gives_the_losses_of_uncached_text(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    common = ["--max_train_steps", "3", "--network_train_unet_only"]
    plain = family.run(images, tmp_path / "a", *common).losses
    cached = family.run(images, tmp_path / "b", *common, "--cache_text_encoder_outputs").losses
    assert plain == pytest.approx(cached, rel=1e-5)


def test_epochs_and_steps_are_saved_and_rotated(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    family.run(
        images, tmp_path, "--max_train_epochs", "3", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1",
        "--save_every_n_steps", "4", "--save_precision", "fp16",
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net-000002.safetensors", "net-run", "net-step00000004.safetensors", "net-step00000008.safetensors", "net.safetensors",
    ]  # fmt: skip
    tensors = read_header(tmp_path / "net.safetensors").tensors
    assert {info.dtype for name, info in tensors.items() if not name.endswith("alpha")} == {"F16"}
    assert {info.dtype for name, info in tensors.items() if name.endswith("alpha")} == {"F32"}


def test_no_metadata_keeps_what_loading_needs(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    metadata = read_header(family.run(images, tmp_path, "--max_train_steps", "1", "--no_metadata").file).metadata
    assert "ss_network_module" in metadata and "ss_seed" not in metadata


def test_a_run_starts_from_network_weights(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = family.run(images, tmp_path / "a", "--max_train_steps", "4").file
    for extra in ([], ["--dim_from_weights"]):
        again = family.run(
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


def test_base_weights_are_merged_first(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = family.run(images, tmp_path / "a", "--max_train_steps", "6").file
    plain = family.run(images, tmp_path / "b", "--max_train_steps", "1").losses
    merged = family.run(images, tmp_path / "c", "--max_train_steps", "1", "--base_weights", str(first)).losses
    nothing = family.run(
        images, tmp_path / "d", "--max_train_steps", "1", "--base_weights", str(first), "--base_weights_multiplier", "0"
    ).losses
    assert merged != pytest.approx(plain, rel=1e-6) and nothing == pytest.approx(plain, rel=1e-6)


def test_base_weights_change_cached_text_too(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = family.run(images, tmp_path / "a", "--max_train_steps", "6", "--network_train_text_encoder_only").file
    common = ["--max_train_steps", "2", "--network_train_unet_only", "--base_weights", str(first)]
    plain = family.run(images, tmp_path / "b", *common).losses
    cached = family.run(images, tmp_path / "c", *common, "--cache_text_encoder_outputs").losses
    without = family.run(images, tmp_path / "d", *common[:3]).losses
    assert plain == pytest.approx(cached, rel=1e-5) and plain != pytest.approx(without, rel=1e-6)


def test_caches_on_disk_are_kept_for_the_same_precision_only(
    family: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "images"
    shutil.copytree(images, own, ignore=shutil.ignore_patterns(".hadron_cache"))
    (own / "dataset.toml").write_text((images / "dataset.toml").read_text().replace(str(images), str(own)))
    given = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only", "--max_train_steps", "1"]
    said = []
    for precision in ("no", "bf16", "no"):
        family.run(own, tmp_path / "out", *given, "--mixed_precision", precision)
        said.append(re.findall(r"(latents|text): (\d+) in the cache", capsys.readouterr().err))
    assert said == [[("latents", "0"), ("text", "0")], [("latents", "0"), ("text", "0")], [("latents", "10"), ("text", "2")]]


@pytest.mark.parametrize("extra", [["--mixed_precision", "bf16"], ["--mixed_precision", "bf16", "--fp8_base", "--gradient_checkpointing"]])
def test_half_precision_trains(extra: list[str], family: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = family.run(images, tmp_path / "a", "--max_train_steps", "2").losses
    half = family.run(images, tmp_path / "b", "--max_train_steps", "2", *extra).losses
    assert half == pytest.approx(plain, rel=0.1)


def test_tensorboard_gets_the_losses(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    result = family.run(images, tmp_path, "--max_train_steps", "3", "--logging_dir", str(logs))
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
    extra: list[str], message: str, family: SmallFamily, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        family.run(images, tmp_path, "--max_train_steps", "1", *extra)
    assert message in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the (loss|gradient) became (nan|inf) at step \d+; nothing was updated"):
        family.run(images, tmp_path, "--max_train_steps", "30", "--learning_rate", "1e30", "--max_grad_norm", "0")
    assert not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_is_named_without_a_traceback(workers: str, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes((images / "0.png").read_bytes()[:2000])
    (folder / "broken.txt").write_text("a cat")
    (folder / "dataset.toml").write_text(f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    with pytest.raises(ValueError) as caught:
        family.run(folder, tmp_path / "out", "--max_train_steps", "1", "--max_data_loader_n_workers", workers)
    assert "broken.png" in str(caught.value) and "\n" not in str(caught.value)
