"""What a run runs in, as far as it may change the numbers: versions, hardware, environment variables."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

import torch

from library.core.version import git_commit, hadron_version

PACKAGES = (
    "torch", "torchao", "triton", "diffusers", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "pillow",
    "opencv-python", "bitsandbytes", "prodigyopt", "dadaptation", "schedulefree", "deepspeed", "xformers", "flash-attn", "lycoris-lora",
)  # fmt: skip
"""Packages whose version is kept where they are installed."""

VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "PYTHONHASHSEED",
    "SOURCE_DATE_EPOCH", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TRITON_INTERPRET",
)  # fmt: skip
PREFIXES = ("ACCELERATE_", "CUDNN_", "DNNL_", "FSDP_", "KMP_", "MKL_", "NCCL_ALGO", "NCCL_PROTO", "ONEDNN_", "TORCHINDUCTOR_")
"""Environment variables that change the numbers or the bytes of a run: by name, and by the start of their names."""

NO_MATTER = ("_DIR", "_FILE", "_KEY", "_PATH", "_TOKEN")
"""Ends of names that change no number: places, and secrets."""


def versions(modules: Iterable[str] = ()) -> dict[str, str]:
    """Versions by name: Hadron with its commit, Python, packages, and those that bring further `modules` (`lycoris.kohya`)."""
    commit = git_commit()
    found = {"hadron": hadron_version() + (f" ({commit})" if commit else ""), "python": platform.python_version()}
    names = [*PACKAGES, *_packages_of(modules)]
    return found | {name: version for name in dict.fromkeys(names) if (version := _installed(name)) is not None}


def hardware(device: torch.device) -> dict[str, Any]:
    """The system, the processor with its threads and instructions, and the GPU with its memory, capability and CUDA."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": facts.name,
            "gpu_bytes": facts.total_memory,
            "compute_capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda or torch.version.hip or "",
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return found


def environment() -> dict[str, str]:
    """The environment variables that are set and may change the numbers, by name."""
    names = (name for name in sorted(os.environ) if name in VARIABLES or name.startswith(PREFIXES))
    return {name: os.environ[name] for name in names if not name.endswith(NO_MATTER)}


def _packages_of(modules: Iterable[str]) -> list[str]:
    """The installed packages that hold modules of others; asked for only where there are any, for it reads every package's list."""
    tops = {module.partition(".")[0] for module in modules}
    if not tops:
        return []
    brought = importlib.metadata.packages_distributions()
    return [name.lower().replace("_", "-") for top in sorted(tops) for name in brought.get(top, ())]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Its name as the system tells it."""
    if platform.system() == "Linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  a file of the system, not of ours
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
        if name:
            return name
    return platform.processor() or platform.machine()
