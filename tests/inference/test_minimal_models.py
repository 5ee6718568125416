"""Models loaded in parts: in their order, with errors as they are, ready only once nothing is being built, and given back."""

import shutil
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from minimal_runs import ANIMA, Run, distance
from torch import nn

from library.inference.minimal.models import DrawingModels, Parts, check_machine
from library.inference.minimal.options import AdapterOptions, MachineOptions, device_named

CPU = torch.device("cpu")


class Family:
    """A family of single layers, whose loading waits for `gate` and can fail."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.loaded, self.gate = failing, [], threading.Event()

    def check_fit(self, text_encoders: Any, tokenizers: Any, denoiser: nn.Module) -> None:
        return None

    def load_text(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> tuple[list[nn.Module], list[Any]]:
        return [self._load("text")], []

    def load_denoiser(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        self.gate.wait(10)
        return self._load("denoiser")

    def load_vae(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return self._load("vae")

    def _load(self, name: str) -> nn.Module:
        if name == self.failing:
            raise ValueError(f"{name}.safetensors: broken")
        self.loaded.append(name)
        return nn.Linear(2, 2)


def models_of(family: Family) -> DrawingModels:
    parts = Parts(family, None, device=CPU, dtype=torch.float32)
    for name in ("text", "denoiser", "vae"):
        parts.begin(name)
    return DrawingModels(ANIMA, parts, AdapterOptions(), MachineOptions())


def test_the_text_encoder_is_there_while_the_denoiser_is_still_loaded() -> None:
    family = Family()
    models = models_of(family)
    assert len(models.text[0]) == 1 and family.loaded == ["text"]
    family.gate.set()
    assert isinstance(models.denoiser, nn.Linear) and family.loaded == ["text", "denoiser", "vae"]


@pytest.mark.parametrize("name", ["text", "denoiser", "vae"])
def test_an_error_of_the_thread_is_raised_as_it_is(name: str) -> None:
    family = Family(failing=name)
    family.gate.set()
    with pytest.raises(ValueError, match=rf"^{name}.safetensors: broken$"):
        _ = models_of(family).denoiser


def test_after_an_error_nothing_more_is_loaded() -> None:
    family = Family(failing="text")
    models = models_of(family)
    with pytest.raises(ValueError, match="broken"):
        _ = models.text
    family.gate.set()
    with pytest.raises(CancelledError):
        _ = models.vae
    assert "vae" not in family.loaded


def test_nothing_is_loaded_after_an_error_that_nobody_waited_for() -> None:
    family = Family(failing="text")
    family.gate.set()
    with pytest.raises(CancelledError):
        _ = models_of(family).vae
    assert family.loaded == []


def test_a_released_model_holds_no_memory() -> None:
    family = Family()
    family.gate.set()
    models = models_of(family)
    models.release_text()
    models.release_denoiser()
    assert all(parameter.is_meta for model in (*models.text[0], models.denoiser) for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in models.vae.parameters())


def test_devices_are_tried() -> None:
    assert device_named("cpu") == CPU
    for name in ("cuda:77", "meta", "gpu"):
        with pytest.raises(ValueError, match=f"--device {name}: cannot be used here"):
            device_named(name)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **how: Any) -> Any:
        raise RuntimeError("no compiler found\nsee above")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile: torch.compile does not work on cpu here \(no compiler found\); leave it out"):
        check_machine(MachineOptions(compile=True), CPU, ANIMA)


def test_compiling_is_refused_for_a_family_without_a_row_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ANIMA), "has_blocks", False)
    with pytest.raises(ValueError, match="--compile: Anima has no row of blocks"):
        check_machine(MachineOptions(compile=True), CPU, ANIMA)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
def test_compiled_blocks_draw_the_same_picture(small_anima_files: Any, tmp_path: Path) -> None:
    run = Run(small_anima_files, tmp_path)
    [plain], [compiled] = run("--prompt", "a cat"), run("--prompt", "a cat", "--compile")
    assert distance(plain, compiled) <= 1
