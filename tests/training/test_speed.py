"""Switches of torch's back-ends: set where they are asked for, and said where they can do nothing; `--deterministic` refuses chance."""

import os
from collections.abc import Iterator

import pytest
import torch

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.training import speed
from library.training.adapters import NetworkOptions
from library.training.compiling import CompileOptions
from library.training.speed import WORKSPACE, SpeedOptions, chance_named, refuse_chance, set_backend_switches


def state() -> tuple[bool, bool, bool]:
    return bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


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


@pytest.fixture
def deterministic_put_back(switches: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `--deterministic` sets for the process, put back afterwards."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_deterministic_sets_torch_cudnn_and_the_workspace_of_cublas(deterministic_put_back: None) -> None:
    torch.backends.cudnn.benchmark = True
    set_backend_switches(SpeedOptions(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ[WORKSPACE] == ":4096:8"


def test_a_workspace_of_the_users_own_is_kept_or_refused(deterministic_put_back: None) -> None:
    os.environ[WORKSPACE] = ":16:8"
    set_backend_switches(SpeedOptions(deterministic=True))
    assert os.environ[WORKSPACE] == ":16:8" and list(SpeedOptions(deterministic=True).check()) == []
    os.environ[WORKSPACE] = ":0:0"
    assert "not :0:0; unset it" in next(iter(SpeedOptions(deterministic=True).check()))


def test_deterministic_and_the_benchmark_exclude_each_other() -> None:
    assert "exclude each other" in next(iter(SpeedOptions(deterministic=True, cuda_cudnn_benchmark=True).check()))


def chosen(arch: Architecture, *argv: str) -> OptionSet:
    groups = [arch.ModelOptions, NetworkOptions, CompileOptions, SpeedOptions]
    given = ["--pretrained_model_name_or_path", ".", "--network_module", "networks.lora", *argv]
    return parse_command_line(groups, given, prog="test", about="test")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--network_args", "autotune=True"], "autotune=True chooses ways by measured time"),
        (["--compile", "--compile_mode", "max-autotune-no-cudagraphs"], "--compile_mode max-autotune-no-cudagraphs chooses kernels"),
    ],
)
@pytest.mark.parametrize("family", architecture_names())
def test_what_is_chosen_by_the_clock_is_refused_by_name(family: str, given: list[str], message: str) -> None:
    arch = architecture_named(family)
    options = chosen(arch, "--deterministic", *given)
    with pytest.raises(OptionError, match=message):
        refuse_chance(options, options[arch.ModelOptions])
    plain = chosen(arch, *given)
    refuse_chance(plain, plain[arch.ModelOptions])


def test_a_kernel_that_adds_in_no_order_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    options = chosen(architecture_named(architecture_names()[0]), "--deterministic")

    class Attention:
        attention = "flash"

    with pytest.raises(OptionError, match="--attn_mode flash adds in no fixed order; use --attn_mode torch"):
        refuse_chance(options, Attention())


def test_an_operator_that_cannot_repeat_itself_is_an_error_by_name() -> None:
    with (
        pytest.raises(ValueError, match=r"--deterministic: put_ does not have a deterministic implementation in torch .*; leave"),
        chance_named(),
    ):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set ...")
    with pytest.raises(RuntimeError, match="out of memory"), chance_named():
        raise RuntimeError("out of memory")
