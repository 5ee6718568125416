"""The kernels compile for GPUs, fit them, and read memory as it should be read: what no interpreter can tell, and no GPU is needed for."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from absent_gpu import SHARED_MEMORY, compiled

from networks.kernels.triton.hadamard import hadamard_gradients, hadamard_weight
from networks.kernels.triton.linear import extended_linear, extended_linear_input_gradient, extended_linears
from networks.kernels.triton.mixing import kronecker_mix

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def loha(rank: int, dtype: torch.dtype) -> None:
    """Parameters in float32, the weight in `dtype`."""
    a, b = zeros(1280, rank, dtype=torch.float32), zeros(rank, 1280, dtype=torch.float32)
    weight = zeros(1280, 1280, dtype=dtype)
    hadamard_weight(a, b, a, b, 0.5, weight)
    hadamard_gradients(weight, a, b, a, b)


def linears(tokens: int, dtype: torch.dtype) -> None:
    """Forward, and for many tokens backward and three layers at once."""
    x, weight, hidden = zeros(tokens, 1280, dtype=dtype), zeros(1280, 1280, dtype=dtype), zeros(tokens, 16, dtype=dtype)
    up, bias = zeros(1280, 16, dtype=dtype), zeros(1280, dtype=dtype)
    extended_linear(x, weight, bias, hidden, up)
    if tokens < 4096:
        return
    extended_linear_input_gradient(x, weight, hidden, zeros(16, 1280, dtype=dtype))
    extended_linears(x, [weight] * 3, [None] * 3, [hidden] * 3, [up] * 3)


def mix(outer: int, inner: int, width: int, dtype: torch.dtype) -> None:
    kronecker_mix(zeros(outer, inner, dtype=torch.float32), zeros(64, inner, width, dtype=dtype), zeros(64, outer, width, dtype=dtype))


LAUNCHES: dict[str, Callable[[torch.dtype], None]] = {
    "loha-8": lambda dtype: loha(8, dtype),
    "loha-32": lambda dtype: loha(32, dtype),
    "loha-64": lambda dtype: loha(64, dtype),
    "linear-64": lambda dtype: linears(64, dtype),
    "linear-256": lambda dtype: linears(256, dtype),
    "linear-4096": lambda dtype: linears(4096, dtype),
    "mix-8": lambda dtype: mix(8, 8, 160, dtype),
    "mix-32": lambda dtype: mix(32, 64, 16, dtype),
    "mix-128": lambda dtype: mix(128, 128, 80, dtype),
}
TARGETS = [(86, torch.bfloat16), (86, torch.float32), (90, torch.bfloat16), (120, torch.bfloat16)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile anew, and leave nothing at home."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(("capability", "dtype"), TARGETS, ids=str)
def test_kernels_fit_a_gpu_and_use_it(capability: int, dtype: torch.dtype, launch: str):
    costs = compiled(capability, lambda: LAUNCHES[launch](dtype))
    assert costs
    for cost in costs:
        assert cost.shared <= 1024 * SHARED_MEMORY[capability], cost.kernel
        assert cost.spilled <= 64, cost.kernel  # a few of 255 registers
        assert ("mma" in cost.instructions) == (dtype == torch.bfloat16), cost.kernel  # tensor cores
        assert re.search(r"cp\.async\.cg\.shared\.global|ld\.global\.v4", cost.instructions), cost.kernel  # 16 bytes at a time
