"""Contestants on one layer: what is traced of a step begins with nothing of the step before."""

import pytest
import torch
from torch import Tensor

from benchmarks import contest
from benchmarks.contest import Contestant, Ground, contestant_on, factor_values
from benchmarks.measure import Trace, traced
from benchmarks.peers import OURS, Setting, ours
from benchmarks.shapes import PRECISIONS, Shape

LOHA = Setting(algorithm="loha", rank=2)


def test_a_trace_begins_without_the_gradients_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory before the step would have them, and the step seem to need less."""
    ground = Ground.of(Shape(out=8, inner=6, tokens=4), PRECISIONS["float32"])
    contestant = contestant_on(ground.layer, LOHA, OURS, ours, factor_values(ground.layer, LOHA, ground.precision))
    left: list[list[Tensor | None]] = []

    def noted(*args: object, **options: object) -> Trace:
        left.append(_gradients(ground, contestant))
        return traced(*args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(contest, "traced", noted)
    for _ in range(2):
        ground.trace(contestant)
        assert all(isinstance(gradient, torch.Tensor) for gradient in _gradients(ground, contestant))
    assert {gradient for gradients in left for gradient in gradients} == {None}


def _gradients(ground: Ground, contestant: Contestant) -> list[Tensor | None]:
    return [tensor.grad for tensor in (ground.x, *contestant.parameters)]
