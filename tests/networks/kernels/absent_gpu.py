"""Compiles what a launch would run, for a GPU that is not there."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from networks.kernels.triton import hadamard, linear, mixing

SHARED_MEMORY = {86: 99, 90: 227, 120: 99}
"""Capability -> KiB that a program may have: Ampere's and Ada's smaller chips, Hopper, and Blackwell's smaller chips."""


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs of a GPU."""

    kernel: str
    shared: int  # bytes a program
    spilled: int  # bytes a thread
    instructions: str  # in PTX


class AbsentDriver:
    """What Triton's compiler asks of the GPU it compiles for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compiled(capability: int, run: Callable[[], object]) -> list[Cost]:
    """The kernels that `run` would launch on a GPU of this compute capability, compiled and not launched."""
    with _launching(capability) as kernels:
        run()
    return [_cost_of(kernel) for kernel in kernels]


@contextmanager
def _launching(capability: int) -> Iterator[list[Any]]:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run: Any = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(kernel, *args, grid=grid, warmup=True, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", AbsentDriver(capability))
        for module in (hadamard, linear, mixing):
            patch.setattr(module, "can_read", lambda *tensors: True)
        yield kernels


def _cost_of(kernel: Any) -> Cost:
    import triton

    ptx, capability = kernel.asm["ptx"], kernel.metadata.target.arch
    assembler = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    command = [assembler.path, "-v", "--gpu-name", architecture[1], "-o", "/dev/null", "/dev/stdin"]
    report = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    spilled = max(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    return Cost(kernel.metadata.name, kernel.metadata.shared, spilled, ptx)
