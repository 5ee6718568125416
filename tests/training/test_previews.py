"""Pictures drawn while training: the same as the finished file draws, and nothing of the run is changed by them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_family import SmallFamily

from library.inference.generate import Generator, Request
from library.inference.images import to_images
from library.training.previews import PreviewOptions
from networks.network import Network

LINE = "a red cat --n a dog --w 64 --h 96 --s 3 --l 2.5"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(f"# two of one, one of the other\n{LINE} --d 7,8\na blue dog --w 64 --h 64 --s 2\n", encoding="utf-8")
    return path


def test_previews_come_when_asked_and_change_no_loss(family: SmallFamily, images: Path, prompts: Path, tmp_path: Path) -> None:
    given = ["--max_train_epochs", "2", "--cache_latents", "--network_args", "rank_dropout=0.5"]
    plain = family.run(images, tmp_path / "plain", *given)
    asked = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--sample_every_n_epochs", "2", "--sample_at_first"]
    drawn = family.run(images, tmp_path / "drawn", *given, *asked)
    assert drawn.losses == plain.losses
    found = {tuple(path.stem.split("_")[1:3]) for path in (tmp_path / "drawn" / "sample").glob("net_*.png")}
    assert len(plain.losses) == 8
    assert found == {(moment, number) for moment in ("000000", "000003", "000006", "e000002") for number in ("00", "01", "02")}


@pytest.mark.parametrize("extra", [[], ["--cache_text_encoder_outputs", "--network_train_unet_only"]], ids=["trained text", "cached text"])
def test_a_preview_is_the_picture_that_the_file_draws(
    extra: list[str], family: SmallFamily, images: Path, prompts: Path, tmp_path: Path
) -> None:
    given = ["--max_train_steps", "2", "--sample_prompts", str(prompts), "--sample_every_n_steps", "2", *extra]
    file = family.run(images, tmp_path, *given).file
    arch, options = family.arch, family.options(images, tmp_path)
    models = arch.load(options[arch.ModelOptions], device=torch.device("cpu"), dtype=torch.float32)
    Network.from_file(file, models.denoiser, models.text_encoders).attach()
    generator = Generator(
        arch=arch, models=models, model_options=options[arch.ModelOptions], device=torch.device("cpu"), dtype=torch.float32
    )
    process = arch.noise_process()
    request = Request(
        prompt="a red cat", negative="a dog", width=64, height=96, steps=3, scale=2.5, seed=7,
        sampler=process.preview_sampler, shift=process.preview_shift,
    )  # fmt: skip
    (expected,) = to_images(generator.draw([request]))
    (path,) = (tmp_path / "sample").glob("net_000002_00_*_7.png")
    with Image.open(path) as found:
        assert found.info["prompt"] == "a red cat" and found.info["seed"] == "7"
        difference = np.asarray(found).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_preview_that_fails_is_said_and_the_run_goes_on(
    family: SmallFamily, images: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*given: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("library.training.previews.save_png", full_disk)
    result = family.run(images, tmp_path, "--max_train_steps", "2", "--sample_prompts", str(prompts), "--sample_every_n_steps", "1")
    assert len(result.losses) == 2 and result.file.exists()
    assert "number 0 was not drawn, the run goes on: no space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [("a cat --w 70", "width 70"), ("a cat --d x", "line 1, --d"), ("a cat --am 2", "no network whose strength"), ("", "holds no prompt")],
)
def test_prompts_that_cannot_be_drawn_are_refused_at_the_start(
    line: str, message: str, family: SmallFamily, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        family.run(images, tmp_path, "--max_train_steps", "1", "--sample_prompts", str(path), "--sample_at_first")
    assert message in str(caught.value)


def test_a_flow_shift_is_refused_for_a_model_without_a_flow(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --fs 3", encoding="utf-8")
    with pytest.raises(ValueError, match="flow shift 3: this model predicts noise"):
        sdxl.run(images, tmp_path, "--max_train_steps", "1", "--sample_prompts", str(path), "--sample_at_first")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"sample_every_n_steps": 3}, "--sample_every_n_steps has no effect without --sample_prompts"),
        ({"sample_prompts": "p.txt"}, "--sample_prompts has no effect without --sample_every_n_steps"),
        ({"sample_prompts": "p.txt", "sample_every_n_epochs": 0}, "--sample_every_n_epochs 0: must be at least 1"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(given: dict, problem: str) -> None:
    assert any(found.startswith(problem) or problem in found for found in PreviewOptions(**given).check())
