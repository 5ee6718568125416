"""What an adapted layer gives out is a tensor like any other, and so may be what it is given."""

from typing import Any

import pytest
import torch
from adapter_cases import filled, has_arguments
from torch import nn

from networks.base import Adapter
from networks.kernels.choice import Choice
from networks.kernels.cost import Path
from networks.members import algorithms

WAYS = [
    (algorithm, arguments)
    for algorithm in algorithms()
    for arguments in ({}, {"factor": 2, "full_matrix": True})
    if has_arguments(algorithm, arguments)
]


def adapted(algorithm: type[Adapter], path: Path, **arguments: Any) -> tuple[nn.Module, Adapter]:
    torch.manual_seed(0)
    layer = nn.Linear(12, 18).requires_grad_(False)
    adapter = filled(algorithm.fresh("x", layer, 2, 1.0, algorithm.Arguments(**arguments)))
    adapter.choice = Choice(path)
    adapter.attach()
    return layer, adapter


@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize(("algorithm", "arguments"), WAYS)
def test_an_output_may_be_changed_in_place(algorithm: type[Adapter], arguments: dict[str, Any], path: Path):
    layer, adapter = adapted(algorithm, path, **arguments)
    x = torch.randn(2, 5, 12, requires_grad=True)
    expected = torch.autograd.grad((layer(x) * 2).sum(), [x, *adapter.parameters()])
    found = torch.autograd.grad(layer(x).mul_(2).sum(), [x, *adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize(("algorithm", "arguments"), WAYS)
def test_inputs_and_gradients_may_lie_in_memory_in_any_order(algorithm: type[Adapter], arguments: dict[str, Any], path: Path):
    layer, adapter = adapted(algorithm, path, **arguments)
    x = torch.randn(12, 5, 2, requires_grad=True)
    strided = layer(x.permute(2, 1, 0)).permute(2, 1, 0)
    plain = layer(x.permute(2, 1, 0).contiguous()).permute(2, 1, 0).contiguous()
    weights = torch.randn(plain.shape)
    torch.testing.assert_close(strided, plain)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), [x, *adapter.parameters()]) for y in (strided, plain)), strict=True):
        torch.testing.assert_close(one, other)
