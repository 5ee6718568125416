"""Whole runs of two processes: the trained weights are those of one process that accumulates as many batches."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import HERE, ROOT, two
from PIL import Image

from library.core.tensor_file import load_tensors
from library.models.architecture import architecture_names

SIZES = [(64, 64), (64, 64), (96, 64), (64, 96), (64, 64)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of three shapes, so that an epoch ends with a rank that has none; one of them is preserved, all act at less than 1."""
    folder = tmp_path_factory.mktemp("data")
    for index, size in enumerate(SIZES):
        place = folder / ("kept" if index == 1 else "plain")
        place.mkdir(exist_ok=True)
        Image.effect_noise(size, 40 + index).convert("RGB").save(place / f"{index}.png")
        (place / f"{index}.txt").write_text("a cat")
    path = folder / "dataset.toml"
    path.write_text(
        "[general]\nresolution = [96, 64]\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 32\n"
        f"[[datasets]]\nbatch_size = 1\nnetwork_multiplier = 0.5\n[[datasets.subsets]]\nimage_dir = '{folder / 'plain'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'kept'}'\ncustom_attributes = {{ diff_output_preservation = true }}\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", architecture_names())
def test_two_processes_train_what_one_does_over_buckets_and_uneven_ends(
    family: str, small_model_options: Callable[[str], tuple[str, ...]], dataset: Path, tmp_path: Path
) -> None:
    run = [
        f"{family}_train_network.py", *small_model_options(family), "--dataset_config", str(dataset), "--seed", "1",
        "--network_module", "networks.lokr", "--optimizer_type", "SGD", "--learning_rate", "0.1", "--max_train_epochs", "2",
        "--gradient_checkpointing", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    together = two(*run, "--output_dir", str(tmp_path / "two"))
    alone = subprocess.run(
        [sys.executable, *run, "--output_dir", str(tmp_path / "one"), "--gradient_accumulation_steps", "2"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert together.returncode == 0 and alone.returncode == 0, together.stderr + alone.stderr
    first, second = load_tensors(tmp_path / "two" / "last.safetensors"), load_tensors(tmp_path / "one" / "last.safetensors")
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both_with_the_images_of_both(
    small_model_options: Callable[[str], tuple[str, ...]], dataset: Path, tmp_path: Path
) -> None:
    run = [
        str(HERE / "fault_on_one.py"), "sdxl", "1", "1", *small_model_options("sdxl"), "--dataset_config", str(dataset), "--seed", "1",
        "--network_module", "networks.lora", "--max_train_steps", "4", "--nan_policy", "skip", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    done = two(*run, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    events = map(json.loads, (tmp_path / "last-run" / "log.jsonl").read_text().splitlines())
    [left_out] = [event for event in events if event.get("event") == "left_out"]
    assert left_out["step"] == 2 and len(left_out["images"]) == 2
    assert all(tensor.isfinite().all() for tensor in load_tensors(tmp_path / "last.safetensors").values())
