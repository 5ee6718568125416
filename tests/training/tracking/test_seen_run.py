"""Whole runs: what they leave to be seen, and that seeing changes nothing of what is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_family import SmallFamily

from library.core.tensor_file import load_tensors
from library.training.optimizing.average import averaged_file

STEPS = ["--max_train_steps", "6", "--cache_latents"]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "net-run" / "log.jsonl").read_text(encoding="ascii").splitlines()]


def test_the_log_has_every_step_and_what_happened(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    asked = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--validation_split", "0.4", "--save_every_n_steps", "2"]
    result = family.run(images, tmp_path, *STEPS, *asked)
    log = log_of(tmp_path)
    assert [(line["step"], line["loss/current"]) for line in log if "loss/current" in line] == list(enumerate(result.losses, 1))
    events = [(line["event"], line["step"]) for line in log if line.get("event") in ("saved", "previews")]
    assert events == [("saved", 2), ("previews", 3), ("saved", 4), ("saved", 6), ("previews", 6)]
    drawn = [file for line in log if line.get("event") == "previews" for file in line["files"]]
    assert len(drawn) == 2 and all((tmp_path / "sample" / Path(file).name).is_file() for file in drawn)
    figures = {key for line in log for key in line}
    denoiser = family.arch.parts[0].name
    assert {"loss/validation/epoch_average", "speed/images_per_second", "loss/epoch_average"} <= figures
    assert {f"norm/gradient/{denoiser}/attention", f"norm/weight/{denoiser}/mlp"} <= figures
    for kind in ("loss/band/", "loss/validation/epoch_band/"):
        assert any(key.startswith(kind) for key in figures)


def test_the_average_is_saved_beside_and_changes_nothing(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = family.run(images, tmp_path / "plain", *STEPS)
    averaged = family.run(images, tmp_path / "averaged", *STEPS, "--ema_decay", "0.9", "--save_every_n_steps", "1")
    first, second, average = (load_tensors(file) for file in (plain.file, averaged.file, averaged_file(averaged.file)))
    assert averaged.losses == plain.losses and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    expected = load_tensors(averaged_file(tmp_path / "averaged" / "net-step00000001.safetensors"))
    for number in range(2, 7):
        own = second if number == 6 else load_tensors(tmp_path / "averaged" / f"net-step{number:08d}.safetensors")
        kept = min(0.9, (1 + number) / (10 + number))
        expected = {name: kept * tensor + (1 - kept) * own[name] for name, tensor in expected.items()}
    torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(tensor, second[name]) for name, tensor in average.items())


def test_previews_and_validation_show_the_average(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    seen = []
    for name, extra in (("plain", []), ("averaged", ["--ema_decay", "0.999"])):
        asked = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "6", "--validation_split", "0.4", "--learning_rate", "1e-1"]
        sdxl.run(images, tmp_path / name, *STEPS, *asked, *extra)
        losses = [line["loss/validation/epoch_average"] for line in log_of(tmp_path / name) if "loss/validation/epoch_average" in line]
        seen.append((losses, next((tmp_path / name / "sample").glob("*.png")).read_bytes()))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


def test_an_optimizer_that_averages_itself_is_refused_before_models_are_loaded(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match="--ema_decay: AdamWScheduleFree averages the weights itself"):
        sdxl.run(images, tmp_path, *STEPS, "--ema_decay", "0.9", "--optimizer_type", "AdamWScheduleFree")
