"""Pictures drawn while training: the same as the finished file draws, and nothing of the run is changed by them."""

import logging
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_family import SmallFamily
from torch import Tensor, nn

from library.core.tensor_file import load_tensors
from library.inference.generate import Generator, Request
from library.inference.images import to_images
from library.training.previews import PreviewOptions, Previews
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


class OwnRandomness(nn.Module):
    """A third-party network that draws from every global generator, in training as in previews."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(layer.out_features, 1))
        self.down = nn.Parameter(torch.full((1, layer.in_features), 0.1))
        self.layer = [layer]  # a list, so that the layer is no part of the network

    def apply_to(self, *models: object) -> None:
        layer, own = self.layer[0], self.layer[0].forward

        def forward(x: Tensor) -> Tensor:
            factor = float(torch.rand(())) + random.random() + float(np.random.rand())
            return own(x) + factor * (x @ self.down.T @ self.up.T)

        layer.forward = forward

    def prepare_optimizer_params(self, text_encoder_lr: object, unet_lr: object, default_lr: float) -> list[dict]:
        return [{"params": [self.up, self.down], "lr": default_lr}]

    def save_weights(self, file: str, dtype: object, metadata: dict[str, str]) -> None:
        save_file({"up": self.up.detach(), "down": self.down.detach()}, file, metadata)


@pytest.fixture
def random_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network module that makes `OwnRandomness` on the last layer of the denoiser."""

    def create_network(multiplier: float, dim: int, alpha: float, vae: object, text_encoder: object, unet: nn.Module, **others: object):
        return OwnRandomness([layer for layer in unet.modules() if isinstance(layer, nn.Linear)][-1])

    module = ModuleType("random_network")
    module.create_network = create_network  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_network_with_random_numbers_of_its_own_trains_the_same_bytes(
    random_module: str, family: SmallFamily, images: Path, prompts: Path, tmp_path: Path
) -> None:
    asked = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first"]
    runs = []
    for name, extra in (("plain", []), ("drawn", asked)):
        random.seed(4)
        np.random.seed(4)
        result = family.run(images, tmp_path / name, "--max_train_steps", "3", "--cache_latents", *extra, module=random_module)
        runs.append((result.losses, {key: tensor.tolist() for key, tensor in load_tensors(result.file).items()}))
    assert runs[0] == runs[1] and len(list((tmp_path / "drawn" / "sample").glob("*.png"))) == 12
    assert any(any(row) for row in runs[0][1]["up"])


def drawn_by(family: SmallFamily, prompts: Path, folder: Path, **asked: Any) -> list[Path]:
    """The previews of a new model, without a run."""
    arch, options = family.arch, PreviewOptions(sample_prompts=str(prompts), sample_at_first=True)
    model_options = family.options(prompts.parent, folder)[arch.ModelOptions]
    models = arch.load(model_options, device=torch.device("cpu"), dtype=torch.float32)
    generator = Generator(arch=arch, models=models, model_options=model_options, device=torch.device("cpu"), dtype=torch.float32)
    previews = Previews.of(options, arch, folder, "net", 1, model_options)
    return previews.draw(generator, nn.Linear(1, 1), "000001", text_is_fixed=True, **asked)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("odd"), AssertionError()])
def test_one_picture_that_fails_does_not_cost_the_others(
    error: Exception, sdxl: SmallFamily, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode, numbers = Generator.encode, iter(range(3))

    def failing(self: Generator, requests: Any) -> Any:
        if next(numbers) == 1:
            raise error
        return encode(self, requests)

    monkeypatch.setattr(Generator, "encode", failing)
    monkeypatch.setattr(logging.getLogger("hadron"), "propagate", True)
    files = drawn_by(sdxl, prompts, tmp_path)
    assert [path.name.split("_")[2] for path in files] == ["00", "02"] and all(path.exists() for path in files)
    assert f"number 1 was not drawn, the run goes on: {str(error) or 'AssertionError'}" in caplog.text


def test_a_run_that_shall_end_does_not_wait_for_the_rest(sdxl: SmallFamily, prompts: Path, tmp_path: Path) -> None:
    answers = iter([False, True])
    assert len(drawn_by(sdxl, prompts, tmp_path, asked_to_end=lambda: next(answers))) == 1


def test_with_a_pinned_date_names_repeat_and_files_are_replaced(
    sdxl: SmallFamily, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first = drawn_by(sdxl, prompts, tmp_path)
    content = first[0].read_bytes()
    first[0].write_bytes(b"old")
    assert drawn_by(sdxl, prompts, tmp_path) == first and first[0].read_bytes() == content
    assert first[0].name == "net_000001_00_19700102000000_7.png" and len(list((tmp_path / "sample").iterdir())) == 3


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
