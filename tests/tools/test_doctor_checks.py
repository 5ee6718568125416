"""What the doctor's checks find on machines that are well, and on such as are not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.models.attention import BACKENDS, Backend
from tools.health import attention, devices, disks, host, launching, options, software, steps
from tools.health.finding import Finding, Patient

CPU = torch.device("cpu")


def patient(*arguments: str, folder: Path = Path(), family: str | None = None) -> Patient:
    return Patient(devices=(CPU,), folders=(folder,), family=family, arguments=arguments)


def one(found: list[Finding], start: str) -> Finding:
    [finding] = [finding for finding in found if finding.subject.startswith(start)]
    return finding


# Software


def test_pinned_packages_are_compared(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("# tested with\nnumpy==0.0.1\nno-such-package==1.0\n")
    missing, other = software._pinned(pins)
    assert (missing.level, other.level) == ("fail", "warn")
    assert "no-such-package" in missing.text and "(tested with 0.0.1)" in other.text


def test_packages_as_pinned_are_well(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text(f'numpy=={software._version("numpy")}; platform_system != "nowhere"\n')
    [finding] = software._pinned(pins)
    assert finding.level == "ok"


def test_variables_that_matter_are_named_and_tokens_are_not_shown() -> None:
    finding = software._environment({"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "k3y", "OMP_NUM_THREADS": "4", "HOME": "mine"})
    assert finding.text == "HF_TOKEN=***, OMP_NUM_THREADS=4, WANDB_API_KEY=***"


def test_an_optional_package_that_is_not_there_is_no_fault() -> None:
    finding = software._optional("no_such_package", "--something")
    assert finding.level == "ok" and "only needed for --something" in finding.text


def test_a_package_that_does_not_import_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package_of_a_test.py").write_text("raise OSError('libcuda.so.1: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = software._optional("broken_package_of_a_test", "--something")
    assert finding.level == "warn" and "libcuda.so.1" in finding.text


def test_an_8_bit_step_is_tried() -> None:
    assert software._eight_bit(CPU).level in ("ok", "warn")  # bitsandbytes may have no library for this machine


def test_a_wrong_8_bit_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", lambda self: None)
    assert software._eight_bit(CPU).level == "fail"


# Devices


def test_the_cpu_is_always_there() -> None:
    assert devices.every_device()[0] == CPU


def test_half_precision_is_measured() -> None:
    finding = devices._half(CPU, "bf16")
    assert finding.level in ("ok", "warn") and "relative error" in finding.text


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.HALVES, "bf16", (torch.bfloat16, 0.0))
    assert devices._half(CPU, "bf16").level == "fail"


def test_an_emulated_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 1.0])
    monkeypatch.setattr(devices, "_seconds", lambda a, b: next(seconds))
    finding = devices._half(CPU, "fp16")
    assert finding.level == "warn" and "10 times the time of fp32" in finding.text


def test_a_gpu_that_torch_does_not_see_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_has_nvidia_gpu", lambda: True)
    assert devices._build().level == "fail"


def test_a_compiler_that_does_not_work_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise ValueError("--compile: torch.compile does not work on cpu here (no g++); leave it out")

    monkeypatch.setattr(devices, "check_compiler", refuse)
    finding = devices._compiler(CPU)
    assert finding.level == "warn" and "no g++" in finding.text


@pytest.mark.parametrize(
    ("entry", "capability", "runs"),
    [
        ("sm_86", (8, 6), True),
        ("sm_80", (8, 9), True),
        ("sm_90a", (9, 0), True),
        ("sm_80", (9, 0), False),
        ("sm_90", (8, 0), False),
        ("compute_80", (12, 0), True),
        ("sm_120", (12, 0), True),
    ],
)
def test_code_for_a_capability_is_known(entry: str, capability: tuple[int, int], runs: bool) -> None:
    assert devices._runs_on(entry, *capability) is runs


# Attention


def test_attention_of_torch_is_right_here() -> None:
    found = list(attention.attention(patient()))
    assert {finding.level for finding in found} == {"ok"}
    assert "math" in one(found, "torch's attention").text


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return 1.01 * attention._torchs(query, key, value)


def no_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention._torchs(query.detach(), key, value)


@pytest.mark.parametrize("kernel", [wrong, no_gradient])
def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setitem(BACKENDS, "torch", Backend(build=lambda: kernel))
    assert attention._mode("torch", CPU, torch.float32).level == "fail"


def test_a_kernel_whose_gradient_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention._torchs(0.5 * query + 0.5 * query.detach(), key, value)

    monkeypatch.setitem(BACKENDS, "torch", Backend(build=lambda: half_gradient))
    assert attention._mode("torch", CPU, torch.float32).level == "fail"


# Cores, memory, disks


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_the_cores_of_a_control_group_are_read(tmp_path: Path) -> None:
    assert host.cpu_limit(tmp_path) is None
    assert host.cpu_limit(write(tmp_path, cpu_dot_max="150000 100000\n")) == 1.5
    assert host.cpu_limit(write(tmp_path, cpu_dot_max="max 100000\n")) is None


def test_the_cores_of_an_old_control_group_are_read(tmp_path: Path) -> None:
    write(tmp_path, **{"cpu__cpu.cfs_quota_us": "200000\n", "cpu__cpu.cfs_period_us": "100000\n"})
    assert host.cpu_limit(tmp_path) == 2


def test_the_memory_that_a_control_group_leaves_is_read(tmp_path: Path) -> None:
    assert host.memory_limit(tmp_path) is None
    assert host.memory_limit(write(tmp_path, **{"memory.max": "1000\n", "memory.current": "400\n"})) == 600
    assert host.memory_limit(write(tmp_path, **{"memory.max": "max\n"})) is None


def test_more_threads_than_cores_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "10000")
    assert host._cores().level == "warn"


def test_little_shared_memory_is_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(host, "LITTLE_SHARED", 2**60)
    finding = host._shared_memory()
    assert finding.level == "warn" and "--shm-size" in finding.advice


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "SAMPLE", 2**16)
    [finding] = disks.disks(patient(folder=tmp_path / "new"))
    assert "MB/s with fsync" in finding.text and list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_belongs_fails(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    [finding] = disks.disks(patient(folder=tmp_path / "out"))
    assert finding.level == "fail"


def test_a_disk_that_changes_bytes_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "SAMPLE", 2**10)
    monkeypatch.setattr(disks, "_forget", lambda file: file.write_bytes(os.urandom(2**10)))
    [finding] = disks.disks(patient(folder=tmp_path))
    assert finding.level == "fail" and "cannot be trusted" in finding.text


# accelerate's configuration


def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Finding:
    file = tmp_path / "default_config.yaml"
    file.write_text(text)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    [finding] = launching.launching(patient())
    return finding


CONFIGURATION = "compute_environment: LOCAL_MACHINE\ndistributed_type: {}\nmixed_precision: bf16\nnum_processes: {}\nuse_cpu: false\n"


def test_a_fitting_configuration_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = configured(tmp_path, monkeypatch, CONFIGURATION.format("'NO'", 1))
    assert finding.level == "ok" and "NO, 1 processes, --mixed_precision bf16" in finding.text


def test_more_processes_than_gpus_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    finding = configured(tmp_path, monkeypatch, CONFIGURATION.format("MULTI_GPU", 4))
    assert finding.level == "fail" and "4 processes" in finding.text and "but 2 GPUs" in finding.text


def test_a_configuration_that_cannot_be_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(tmp_path, monkeypatch, "compute_environment: [").level == "fail"


def test_no_configuration_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    assert [finding.level for finding in launching.launching(patient())] == ["ok"]


# Options of a training script


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    (tmp_path / "a.png").touch()
    file = tmp_path / "dataset.toml"
    file.write_text(f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\n")
    return file


def test_every_option_that_the_script_would_refuse_is_found() -> None:
    found = list(options.training_options(patient("--learning_rat", "1", "--optimizer_type", "AdamX", "--seed", "x", family="sdxl")))
    assert {finding.level for finding in found} == {"fail"}
    said = " ".join(finding.text for finding in found)
    assert "did you mean '--learning_rate'" in said and "AdamX" in said and "--seed" in said


def test_options_that_are_well_are_well(small_sdxl_file: Path, dataset: Path) -> None:
    given = ("--pretrained_model_name_or_path", str(small_sdxl_file), "--dataset_config", str(dataset))
    assert [finding.level for finding in options.training_options(patient(*given, family="sdxl"))] == ["ok"]


def test_a_damaged_model_file_is_found(small_sdxl_file: Path, dataset: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(small_sdxl_file.read_bytes()[:1000])
    given = ("--pretrained_model_name_or_path", str(damaged), "--dataset_config", str(dataset))
    found = list(options.training_options(patient(*given, family="sdxl")))
    assert [finding.level for finding in found] == ["fail"] and "damaged.safetensors" in found[0].text


def test_a_missing_model_file_is_found(dataset: Path, tmp_path: Path) -> None:
    given = ("--pretrained_model_name_or_path", str(tmp_path / "none.safetensors"), "--dataset_config", str(dataset))
    found = list(options.training_options(patient(*given, family="sdxl")))
    assert [finding.level for finding in found] == ["fail"] and "none.safetensors" in found[0].text


def test_an_option_in_vain_is_warned_about(small_sdxl_file: Path, dataset: Path) -> None:
    given = ("--pretrained_model_name_or_path", str(small_sdxl_file), "--dataset_config", str(dataset), "--vae_batch_size", "4")
    [finding] = options.training_options(patient(*given, family="sdxl"))
    assert finding.level == "warn" and "--vae_batch_size has no effect" in finding.text


def test_without_options_nothing_is_said_of_them() -> None:
    assert list(options.training_options(patient())) == []


# A step


def test_a_process_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = subprocess.CompletedProcess([], -11, stdout='{"level": "ok", "subject": "a", "text": "b"}\n', stderr="Illegal instruction\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **others: crashed)
    first, second = steps.steps(patient())
    assert first.level == "ok"
    assert second.level == "fail" and "ended with status -11: Illegal instruction" in second.text


def test_the_small_models_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    assert [finding.level for finding in steps.steps(patient())] == ["warn"]


def test_each_gpu_is_seen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(command: list[str], **others: Any) -> subprocess.CompletedProcess[str]:
        seen.append(others["env"]["CUDA_VISIBLE_DEVICES"])
        assert command[:3] == [sys.executable, "-m", "tools.health.steps"] and command[3] == "cuda"
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    gpus = tuple(torch.device("cuda", index) for index in range(2))
    assert list(steps.steps(Patient(devices=gpus, folders=()))) == [] and seen == ["4", "6"]
