"""Optimizers, schedules and precision of the adapters in whole runs."""

from pathlib import Path

import pytest
import torch
from small_family import SmallFamily

from library.core.tensor_file import load_tensors, read_header


def test_a_fused_backward_pass_gives_the_same_losses_and_bytes(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    ways = {"after": (), "during": ("--fused_backward_pass",)}
    runs = {
        way: family.run(images, tmp_path / way, "--max_train_steps", "2", "--max_grad_norm", "0", *extra) for way, extra in ways.items()
    }
    assert runs["after"].losses == runs["during"].losses
    first, second = (load_tensors(run.file) for run in runs.values())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_saving_on_the_way_changes_nothing_for_a_schedule_free_optimizer(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    argv = ("--max_train_steps", "4", "--optimizer_type", "AdamWScheduleFree")
    plain = sdxl.run(images, tmp_path / "plain", *argv)
    saving = sdxl.run(images, tmp_path / "saving", *argv, "--save_every_n_steps", "1")
    assert plain.losses == saving.losses
    first, second = (load_tensors(run.file) for run in (plain, saving))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("optimizer", "arguments", "entry"), [
    ("adamw8bit", (), "bitsandbytes.optim.adamw.AdamW8bit()"),
    ("prodigy", ("--learning_rate", "1", "--lr_scheduler", "cosine"), "prodigyopt.prodigy.Prodigy()"),
    ("adafactor", ("--optimizer_args", "relative_step=True"), "transformers.optimization.Adafactor(relative_step=True)"),
])  # fmt: skip
def test_a_file_says_which_optimizer_made_it(
    optimizer: str, arguments: tuple[str, ...], entry: str, sdxl: SmallFamily, images: Path, tmp_path: Path
) -> None:
    result = sdxl.run(images, tmp_path, "--max_train_steps", "2", "--optimizer_type", optimizer, *arguments)
    assert read_header(result.file).metadata["ss_optimizer"] == entry
