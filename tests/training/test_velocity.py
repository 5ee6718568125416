"""A run on a model that predicts velocity: its target, its files and its previews."""

import json
from pathlib import Path

import pytest
import torch
from small_family import SmallFamily

from library.core.tensor_file import load_tensors, read_header, save_tensors

VELOCITY = ["--v_parameterization", "--zero_terminal_snr"]


@pytest.fixture
def velocity(sdxl: SmallFamily, tmp_path: Path) -> SmallFamily:
    """The tiny SDXL with the marks of a checkpoint that predicts velocity and ends in pure noise."""
    at = sdxl.files.index("--pretrained_model_name_or_path") + 1
    path = tmp_path / "velocity.safetensors"
    save_tensors(path, load_tensors(Path(sdxl.files[at])) | {name: torch.zeros(0) for name in ("v_pred", "ztsnr")})
    tokenizer = ["--tokenizer", str(Path(sdxl.files[at]).with_suffix(".tokenizer"))]
    return SmallFamily(sdxl.arch, (*sdxl.files[:at], str(path), *sdxl.files[at + 1 :], *tokenizer))


def test_a_run_says_in_its_file_that_the_model_predicts_velocity(velocity: SmallFamily, images: Path, tmp_path: Path) -> None:
    result = velocity.run(images, tmp_path / "out", "--max_train_steps", "1", *VELOCITY)
    assert read_header(result.file).metadata["modelspec.prediction_type"] == "v"


def test_a_run_is_asked_for_velocity(velocity: SmallFamily, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = sdxl.run(images, tmp_path / "plain", "--max_train_steps", "1")
    other = velocity.run(images, tmp_path / "other", "--max_train_steps", "1", *VELOCITY)
    assert other.losses != plain.losses


def test_a_marked_model_without_the_options_is_refused(velocity: SmallFamily, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --v_parameterization and --zero_terminal_snr"):
        velocity.run(images, tmp_path, "--max_train_steps", "1")


def test_previews_begin_in_pure_noise(velocity: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seen = tmp_path / "prompts.json", []
    prompts.write_text(json.dumps([{"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 2, "sample_sampler": "euler"}]))
    predict = velocity.arch.predict
    monkeypatch.setattr(type(velocity.arch), "predict", lambda arch, *given: seen.append(float(given[2][0])) or predict(*given))
    velocity.run(images, tmp_path / "out", "--max_train_steps", "1", "--sample_prompts", str(prompts), "--sample_at_first", *VELOCITY)
    assert seen[0] == 999 and len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
