"""Switches of torch's CUDA back-ends: set where they are asked for, and said where they can do nothing."""

from collections.abc import Iterator

import pytest
import torch

from library.training import speed
from library.training.speed import SpeedOptions, set_backend_switches


def state() -> tuple[bool, bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


def put(matmul: bool, convolutions: bool, benchmark: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolutions
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def switches() -> Iterator[None]:
    """All off, and put back afterwards."""
    before = state()
    put(False, False, False)
    yield
    put(*before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SpeedOptions(), (False, False, False)),
        (SpeedOptions(cuda_allow_tf32=True), (True, True, False)),
        (SpeedOptions(cuda_cudnn_benchmark=True), (False, False, True)),
    ],
    ids=["none", "tf32", "benchmark"],
)
def test_each_switch_sets_its_own(
    options: SpeedOptions, expected: tuple[bool, bool, bool], switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_backend_switches(options)
    assert state() == expected


def test_without_a_gpu_nothing_is_set_and_that_is_said(switches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(speed.logger, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_backend_switches(SpeedOptions(cuda_allow_tf32=True, cuda_cudnn_benchmark=True))
    assert said == ["--cuda_allow_tf32 and --cuda_cudnn_benchmark: no effect without a CUDA GPU"] and state() == (False, False, False)
