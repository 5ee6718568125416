"""Switches of torch and its CUDA back-ends: `--cuda_allow_tf32`, `--cuda_cudnn_benchmark`, `--deterministic`."""

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.core.options import OptionError, option, pairs
from library.training.adapters import NetworkOptions
from library.training.compiling import CompileOptions

logger = get_logger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
ATOMIC_ATTENTION = ("flash", "xformers")  # their backward passes add in whatever order blocks end, as they are called here
INDUCTOR, INDUCTOR_SWITCH = "torch._inductor.config", "TORCHINDUCTOR_DETERMINISTIC"  # read when inductor is imported
MEASURED_MODES = ("max-autotune", "max-autotune-no-cudagraphs")
NO_IMPLEMENTATION = "does not have a deterministic implementation"  # how torch's refusal of an operator reads


@dataclass(kw_only=True, frozen=True)
class SpeedOptions:
    """Speed on CUDA GPUs, and equal bytes."""

    cuda_allow_tf32: bool = option(False, help="products and convolutions of float32 in TF32: 10 bits of mantissa, several times faster")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN try its convolutions once for each size of picture and keep the fastest")
    deterministic: bool = option(
        False, help="the same run gives the same bytes again on the same hardware and versions; what cannot is refused; slower"
    )

    def check(self) -> Iterable[str]:
        """What is wrong: equal bytes asked for beside what differs from run to run."""
        if self.deterministic and self.cuda_cudnn_benchmark:
            yield "--deterministic and --cuda_cudnn_benchmark exclude each other: what is fastest may change from run to run"
        workspace = os.environ.get(WORKSPACE)
        if self.deterministic and workspace is not None and workspace not in WORKSPACES:
            yield f"--deterministic: cuBLAS repeats itself with {WORKSPACE}={' or '.join(WORKSPACES)} only, not {workspace}; unset it"


def set_backend_switches(options: SpeedOptions) -> None:
    """Set the switches that are asked for, for the whole process, before its first product on a GPU.

    Without a CUDA GPU the first two have no effect, and that is said; `--deterministic` holds on every device.
    """
    if options.deterministic:
        set_deterministic()
    names = [f"--{name}" for name in ("cuda_allow_tf32", "cuda_cudnn_benchmark") if getattr(options, name)]
    if names and not torch.cuda.is_available():
        logger.warning("%s: no effect without a CUDA GPU", " and ".join(names))
        return
    if options.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if options.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def set_deterministic() -> None:
    """Let torch use operators that repeat themselves only, for the whole process; others raise, by name."""
    os.environ.setdefault(WORKSPACE, WORKSPACES[0])  # cuBLAS reads it at its first product
    os.environ[INDUCTOR_SWITCH] = "1"
    inductor: Any = sys.modules.get(INDUCTOR)
    if inductor is not None:
        inductor.deterministic = True
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def refuse_chance(options: OptionSet, model_options: object) -> None:
    """Raise `OptionError` with all that cannot be with `--deterministic`: before anything is loaded."""
    if options[SpeedOptions].deterministic:
        problems = list(chances(options, model_options))
        if problems:
            raise OptionError(problems)


def chances(options: OptionSet, model_options: object) -> Iterator[str]:
    """What a run's options leave to chance: ways and kernels that are chosen by the clock, sums in the order of arrival."""
    arguments = {given.name: str(given.value) for given in pairs(options[NetworkOptions].network_args, "--network_args")}
    if arguments.get("autotune", "false").lower() in ("true", "1", "yes", "on"):
        yield "--deterministic: --network_args autotune=True chooses ways by measured time; leave it out"
    attention = getattr(model_options, "attention", "torch")
    if attention in ATOMIC_ATTENTION:
        yield f"--deterministic: the backward pass of --attn_mode {attention} adds in no fixed order; use --attn_mode torch"
    compilation = options[CompileOptions]
    if compilation.compile and compilation.compile_backend == "inductor":
        yield from _of_inductor(compilation)


@contextmanager
def chance_named() -> Iterator[None]:
    """Turn torch's refusal of an operator that cannot repeat itself into an error for the user: which one, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if NO_IMPLEMENTATION not in str(error):
            raise
        operator = str(error).partition(NO_IMPLEMENTATION)[0].strip()
        advice = "leave --deterministic out, or what uses this operator"
        raise ValueError(f"--deterministic: {operator} {NO_IMPLEMENTATION} in torch {torch.__version__}; {advice}") from error


def _of_inductor(compilation: CompileOptions) -> Iterator[str]:
    """Inductor tries reductions by the clock unless it is told not to, which not every version can be."""
    inductor = importlib.import_module(INDUCTOR)
    if compilation.compile_mode in MEASURED_MODES:
        yield f"--deterministic: --compile_mode {compilation.compile_mode} chooses kernels by measured time; use default"
    if not hasattr(inductor, "deterministic"):
        yield f"--deterministic: inductor of torch {torch.__version__} chooses kernels by measured time; leave --compile out"
