"""DeepSpeed's ZeRO takes the steps of one process, and refuses what it cannot do by name."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from launching import HERE, two
from PIL import Image
from small_family import SmallFamily

from library.core.options import OptionError
from library.training.distributed import DistributedOptions
from library.training.parallel.choice import accelerator_arguments
from library.training.parallel.zero import ZeroEngine, plugin_of

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero_engine(stage: int) -> ZeroEngine:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    return ZeroEngine(cast(Any, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))), torch.float32)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("family_name", "stage", "extra"),
    [
        ("sdxl", 3, "--network_module networks.lokr"),
        ("sdxl", 2, "--network_module networks.loha"),
        ("anima", 3, "--network_module networks.lora --gradient_checkpointing"),
    ],
)
def test_two_processes_take_the_steps_of_one(
    family_name: str, stage: int, extra: str, small_model_options: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    for index in range(8):
        Image.effect_noise((64, 64), 40 + index).convert("RGB").save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a cat")
    dataset, config = tmp_path / "dataset.toml", tmp_path / "zero.json"
    dataset.write_text(f"[general]\nresolution = 64\n[[datasets]]\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\n")
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    files = small_model_options(family_name)
    done = two(
        str(HERE / "zero_of_two.py"), str(tmp_path / "found.json"), str(dataset), str(tmp_path), family_name, *files, *extra.split(),
        "--optimizer_type", "SGD", "--learning_rate", "0.1", ACCELERATE_USE_CPU="false", DS_ACCELERATOR="cpu",
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(config),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["worst"] < 1e-5 and min(found["norms"]) > 0.001


def test_settings_are_deepspeeds_own() -> None:
    options = DistributedOptions(deepspeed=True, zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/disk")
    assert options.zero_settings() == {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}}


def test_offloading_that_the_stage_has_not_is_refused() -> None:
    options = DistributedOptions(deepspeed=True, zero_stage=2, offload_param_device="cpu")
    assert list(options.check()) == ["--offload_param_device cpu: needs --zero_stage 3, not 2"]


def test_a_disk_without_a_folder_is_refused() -> None:
    assert "need each other" in next(iter(DistributedOptions(deepspeed=True, offload_optimizer_device="nvme").check()))


def test_without_the_package_the_command_that_installs_it_is_named(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.training.parallel.zero.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install deepspeed"):
        plugin_of(sdxl.options(images, tmp_path, "--deepspeed"))


@needs_deepspeed
def test_without_a_launcher_the_one_to_use_is_named(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(OptionError, match="accelerate launch"):
        plugin_of(sdxl.options(images, tmp_path, "--deepspeed"))


@needs_deepspeed
def test_precision_is_ours_and_not_deepspeeds(sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    arguments = accelerator_arguments(sdxl.options(images, tmp_path, "--deepspeed", "--mixed_precision", "bf16", "--max_grad_norm", "0.5"))
    config = arguments["deepspeed_plugin"].deepspeed_config
    assert arguments["mixed_precision"] == "no" and "bf16" not in config
    assert config["gradient_clipping"] == 0.5 and config["zero_optimization"]["stage"] == 2


@needs_deepspeed
def test_sections_that_options_stand_for_are_refused(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}))
    for name, value in {"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError) as error:
        plugin_of(sdxl.options(images, tmp_path))
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        f"DeepSpeed's configuration, '{it}'" for it in ("bf16", "optimizer")
    ]


@pytest.mark.parametrize(
    ("stage", "extra", "named"),
    [
        (2, ("--optimizer_type", "Adafactor"), "--optimizer_type Adafactor"),
        (1, ("--mixed_precision", "bf16", "--full_bf16"), "--full_bf16"),
        (1, ("--scale_weight_norms", "1"), "--scale_weight_norms"),
        (0, ("--compile",), "--compile"),
        (3, ("--sample_prompts", "prompts.txt", "--sample_at_first"), "--sample_prompts"),
        (3, ("--quantize_base", "int8"), "--quantize_base int8"),
    ],
)
def test_what_zero_cannot_do_is_named(
    stage: int, extra: tuple[str, ...], named: str, sdxl: SmallFamily, images: Path, tmp_path: Path
) -> None:
    problems = list(zero_engine(stage).refusals(sdxl.arch, sdxl.options(images, tmp_path, *extra)))
    assert [problem.split(":")[0] for problem in problems] == [named]


def test_stage_2_draws_previews(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    assert (
        list(zero_engine(2).refusals(sdxl.arch, sdxl.options(images, tmp_path, "--sample_prompts", "prompts.txt", "--sample_at_first")))
        == []
    )
