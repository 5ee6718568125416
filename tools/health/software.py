"""Python, packages and the environment variables that change a run."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from library.core.secrets import MASK
from tools.health.finding import Finding, Patient, fail, first_line, ok, warn

ROOT = Path(__file__).parent.parent.parent
OLDEST_PYTHON = (3, 11)
PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^;\s]+)")
OPTIONAL = {
    "wandb": "--log_with wandb",
    "deepspeed": "--deepspeed",
    "lycoris": "--network_module lycoris.kohya",
    "hf_xet": "faster uploads and downloads",
}
"""Modules that are asked for only where somebody wants them -> what for. Those of attention have a check of their own."""

VARIABLES = (
    "ACCELERATE_", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "HADRON_", "HF_", "HUGGING_FACE_HUB_TOKEN",
    "LOCAL_RANK", "MASTER_", "MKL_NUM_THREADS", "NCCL_", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "SOURCE_DATE_EPOCH", "TORCH",
    "TRANSFORMERS_OFFLINE", "TRITON_", "WANDB_", "WORLD_SIZE",
)  # fmt: skip
"""Beginnings of names of environment variables that change numbers, speed, places or what is sent."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)


def software(patient: Patient) -> Iterator[Finding]:
    """Versions against those that this project is tested with, packages that are not always needed, the environment."""
    yield _python()
    yield _environment(dict(os.environ))  # before packages that set some are imported
    yield from _pinned()
    yield from (_optional(module, use) for module, use in OPTIONAL.items())
    yield from (_eight_bit(device) for device in patient.devices if device.type in ("cpu", "cuda"))


def _python() -> Finding:
    version, oldest = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        return fail("Python", version, f"install Python {oldest} or newer, and run `python run.py setup` with it")
    return ok("Python", f"{version} ({sys.executable})")


def _pinned(file: Path = ROOT / "requirements.txt") -> Iterator[Finding]:
    """What `requirements.txt` names, against what is installed."""
    if not file.is_file():
        return
    pins = {found["name"]: found["version"] for line in file.read_text().splitlines() if (found := PIN.match(line))}
    installed = {name: _version(name) for name in pins}
    missing = [name for name, version in installed.items() if version is None]
    other = [f"{name} {version} (tested with {pins[name]})" for name, version in installed.items() if version and version != pins[name]]
    if missing:
        yield fail("packages", f"missing: {', '.join(missing)}", "run `python run.py setup`, or pip install -r requirements.txt")
    if other:
        yield warn("packages", f"other versions than tested: {', '.join(other)}", "pip install -r requirements.txt, should anything be odd")
    if not missing and not other:
        yield ok("packages", f"the {len(pins)} of requirements.txt, as tested (torch {torch.__version__})")


def _version(name: str) -> str | None:
    """The installed version without its local part, such as +cpu."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional(module: str, use: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return ok(module, f"not installed; only needed for {use}")
    try:
        return ok(module, f"{getattr(importlib.import_module(module), '__version__', 'installed')}, for {use}")
    except Exception as error:  # a package that does not fit the machine fails as it likes
        return warn(module, f"installed, but does not import: {first_line(error)}", f"install it anew, or do without {use}")


def _eight_bit(device: torch.device) -> Finding:
    """One step of bitsandbytes' optimizer: its library may lack the code for a device."""
    subject = f"bitsandbytes on {device}"
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = torch.nn.Parameter(torch.ones(128, 64, device=device))
        optimizer = AdamW8bit([weight], lr=0.1, weight_decay=0.0, min_8bit_size=1)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    except Exception as error:  # a missing package, library or kernel
        return warn(subject, f"does not work: {first_line(error)}", "use --optimizer_type AdamW, or install bitsandbytes anew")
    moved = weight.detach().cpu()
    if not bool(((moved < 1) & (moved > 0.8)).all()):
        return fail(subject, "a step of AdamW8bit went wrong", "use --optimizer_type AdamW, and install bitsandbytes anew")
    return ok(subject, "a step of AdamW8bit is right")


def _environment(variables: dict[str, str]) -> Finding:
    """The variables that matter, with their values where these are no secrets."""
    names = sorted(name for name in variables if name.startswith(VARIABLES))
    shown = [f"{name}={MASK if SECRET.search(name) else variables[name]}" for name in names]
    return ok("environment", ", ".join(shown) or "no variable that changes a run is set")
