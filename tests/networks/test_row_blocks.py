"""Deltas by blocks of rows: the formula of every algorithm, its norm, and sums that need no memory for a whole delta."""

from typing import Any

import pytest
import torch
from adapter_cases import Case, filled, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks import row_blocks
from networks.base import Adapter
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.row_blocks import write_sum

ALGORITHMS = [LoRA, LoHa, LoKr]


def adapter_on(layer: nn.Module, algorithm: type[Adapter], rank: int = 2, **arguments: Any) -> Adapter:
    return filled(algorithm.fresh("x", layer, rank, 1.5, algorithm.Arguments(**arguments)))


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that is made: views and results in place are not."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
            self.largest = max(self.largest, result.numel())
        return result


def test_rows_are_those_of_the_formula(case: Case):
    adapter = filled(case.adapter).double()
    formula, rows = adapter.formula().reshape(adapter.shape.out, -1), adapter.rows()
    assert rows is not None
    for first, stop in [(0, 18), (0, 1), (1, 5), (4, 12), (11, 18)]:
        stop = min(stop, adapter.shape.out)
        assert relative_error(rows.block(slice(first, stop)), formula[first:stop]) < 1e-14


def test_the_norm_is_that_of_the_delta(case: Case):
    adapter = filled(case.adapter).double()
    torch.testing.assert_close(adapter.delta_norm(), torch.linalg.vector_norm(adapter.direction()))


@pytest.mark.parametrize("rank", [2, 12])
def test_the_norm_of_a_loha_is_the_same_by_either_way(rank: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 256)
    adapter = adapter_on(nn.Linear(64, 48), LoHa, rank)
    torch.testing.assert_close(adapter.delta_norm(), torch.linalg.vector_norm(adapter.direction()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sum_by_blocks_is_that_of_the_whole(algorithm: type[Adapter], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 18, 3).requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    adapters = [adapter_on(layer, algorithm), adapter_on(layer, algorithm, dora_wd=True)]
    adapters[0].multiplier = -0.7
    base = layer.weight.to(dtype)
    wide = base.to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = wide + sum(adapter.delta_weight(base).to(wide) * adapter.multiplier for adapter in adapters)
    goal = torch.empty_like(base)
    monkeypatch.setattr(row_blocks, "BLOCK", 5 * 108)
    write_sum(goal, base, adapters)
    near = 1e-6 if dtype.itemsize > 2 else torch.finfo(dtype).eps
    torch.testing.assert_close(goal.to(wide), expected.to(dtype).to(wide), rtol=near, atol=1e-7)
    write_sum(base, base, adapters)
    assert torch.equal(base.to(wide), goal.to(wide))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_rounds_neither_sums_nor_norms(algorithm: type[Adapter]):
    torch.manual_seed(0)
    adapter = adapter_on(nn.Linear(24, 32), algorithm)
    base, expected = torch.zeros(32, 24), adapter.delta_weight().detach()
    with torch.autocast("cpu", torch.bfloat16):
        write_sum(base, base, [adapter])
        norm = adapter.delta_norm()
    assert relative_error(base, expected) < 1e-6
    torch.testing.assert_close(norm, torch.linalg.vector_norm(expected))


def test_a_sum_without_adapters_is_the_base_bit_for_bit():
    base = torch.tensor([[1.0, -0.0, float("nan")]], dtype=torch.bfloat16)
    goal = torch.empty_like(base)
    write_sum(goal, base, [])
    assert torch.equal(goal.view(torch.int16), base.view(torch.int16))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_merge_makes_nothing_as_large_as_the_weight(algorithm: type[Adapter], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 1 << 12)
    layer = nn.Linear(256, 320).half().requires_grad_(False)
    adapter = adapter_on(layer, algorithm)
    with Sizes() as sizes:
        adapter.merge(keep=False)
    assert 0 < sizes.largest <= 1 << 12
