"""Checkpoints that predict velocity: they say so, and the options must say the same."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.core.tensor_file import load_tensors, save_tensors
from library.diffusion.ddpm import PredictionOptions
from library.models.sdxl.checkpoint import load_checkpoint
from library.models.sdxl.prediction import check_prediction
from library.models.sdxl.spec import ARCHITECTURE

NOISE, VELOCITY = PredictionOptions(), PredictionOptions(v_parameterization=True)
ZERO_SNR = PredictionOptions(v_parameterization=True, zero_terminal_snr=True)
Marked = Callable[..., Path]


@pytest.fixture
def marked(small_sdxl_file: Path, tmp_path: Path) -> Marked:
    """The tiny checkpoint with empty tensors of these names beside its own."""

    def mark(*names: str) -> Path:
        path = tmp_path / f"{'_'.join(names) or 'plain'}.safetensors"
        save_tensors(path, load_tensors(small_sdxl_file) | {name: torch.zeros(0) for name in names})
        return path

    return mark


def load(path: Path, prediction: PredictionOptions) -> nn.Module:
    return load_checkpoint(path, dtype=torch.float32, device=torch.device("cpu"), prediction=prediction).unet


@pytest.mark.parametrize(
    ("marks", "options", "told"),
    [
        (("v_pred",), NOISE, r"predicts velocity \(it has the tensor 'v_pred'\); give --v_parameterization$"),
        (("v_pred", "ztsnr"), NOISE, r"ends in pure noise .*'ztsnr'\); give --v_parameterization and --zero_terminal_snr$"),
        (("ztsnr",), NOISE, "give --v_parameterization and --zero_terminal_snr$"),
        (("v_pred", "ztsnr"), VELOCITY, "; give --zero_terminal_snr$"),
    ],
)
def test_a_mark_that_the_options_do_not_say_is_refused_with_the_options(
    marked: Marked, marks: tuple[str, ...], options: PredictionOptions, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        load(marked(*marks), options)


@pytest.mark.parametrize(("marks", "options"), [(("v_pred",), VELOCITY), (("v_pred", "ztsnr"), ZERO_SNR), ((), ZERO_SNR), ((), NOISE)])
def test_marks_change_no_weight(marked: Marked, small_sdxl_file: Path, marks: tuple[str, ...], options: PredictionOptions) -> None:
    plain: dict[str, Tensor] = load(small_sdxl_file, NOISE).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load(marked(*marks), options).state_dict().items())


def test_a_file_that_says_nothing_is_taken_at_the_user_s_word_and_told(
    marked: Marked, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hadron"), "propagate", True)
    caplog.set_level("INFO", logger="hadron")
    check_prediction(marked(), NOISE)
    check_prediction(marked("v_pred"), VELOCITY)
    assert not caplog.records
    check_prediction(marked(), VELOCITY)
    assert [record.getMessage().split(" ", 1)[1] for record in caplog.records] == [
        "does not say what it predicts: taken to predict velocity, as --v_parameterization says"
    ]


def test_the_scheduler_of_a_folder_says_it_too(tmp_path: Path) -> None:
    check_prediction(tmp_path, NOISE)
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}))
    check_prediction(tmp_path, NOISE)
    file.write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    check_prediction(tmp_path, ZERO_SNR)
    with pytest.raises(ValueError, match=r"prediction_type in scheduler_config.json.*give --v_parameterization and --zero_terminal_snr"):
        check_prediction(tmp_path, NOISE)
    file.write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json: not valid JSON"):
        check_prediction(tmp_path, NOISE)


def test_generation_says_it_with_the_same_options(marked: Marked, small_sdxl_file: Path) -> None:
    tokenizer = str(small_sdxl_file.with_suffix(".tokenizer"))
    files = ARCHITECTURE.GenerationFiles(
        ckpt=str(marked("v_pred", "ztsnr")), tokenizer=tokenizer, v_parameterization=True, zero_terminal_snr=True
    )
    options = files.model_options()
    ARCHITECTURE.load(options, device=torch.device("cpu"), dtype=torch.float32)
    assert ARCHITECTURE.noise_process(model_options=options).prediction_type == "v"


@pytest.mark.parametrize("group", [ARCHITECTURE.ModelOptions, ARCHITECTURE.GenerationFiles])
def test_both_scripts_refuse_zero_snr_without_velocity(group: type) -> None:
    name = "ckpt" if group is ARCHITECTURE.GenerationFiles else "pretrained_model_name_or_path"
    assert any(problem.startswith("--zero_terminal_snr: needs") for problem in group(**{name: "x"}, zero_terminal_snr=True).check())
