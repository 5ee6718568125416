"""Ways beside each other on one layer: built on copies that share the weights, given the same values, timed by turns.

Within a turn every contestant runs once, in an order drawn anew; figures are medians over turns of ratios within a turn, so what slows
the machine for a while slows all of them.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.measure import Trace, repeats_for, seconds_of, traced
from benchmarks.peers import Setting, Way, bare_adapter, path_taken, take_over, trained, twin
from benchmarks.results import FROZEN
from benchmarks.shapes import Precision, Shape

LEAST_TURNS, MOST_TURNS = 3, 25
SIZE = 0.05  # standard deviation of the factors


@dataclass(kw_only=True)
class Contestant:
    """A layer, adapted in one way or frozen, with what is trained."""

    setting: Setting | None
    way: str
    layer: nn.Module
    adapter: nn.Module | None = None  # what holds the parameters

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [] if self.adapter is None else list(trained(self.adapter).values())

    @property
    def path(self) -> str:
        """The way to the delta that ours took last."""
        return "" if self.adapter is None else path_taken(self.adapter)


@dataclass(kw_only=True)
class Ground:
    """A frozen layer with an input and the gradient of its output, all of one precision."""

    layer: nn.Module
    x: Tensor
    gradient: Tensor
    precision: Precision
    device: str

    @classmethod
    def of(cls, shape: Shape, precision: Precision, device: str = "cpu") -> "Ground":
        """Random ones, the same for the same shape."""
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        layer = shape.layer(dtype=precision.base, device=device).requires_grad_(False)
        x = torch.randn(shape.input, generator=generator).to(device, precision.base).requires_grad_()
        gradient = torch.randn(_output_shape(shape), generator=generator).to(device, precision.base)
        return cls(layer=layer, x=x, gradient=gradient, precision=precision, device=device)

    def forward(self, layer: nn.Module) -> Tensor:
        """The layer's output, under autocast where that is the precision."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision.is_autocast):
            return layer(self.x)

    def runner(self, contestant: Contestant) -> Callable[[], None]:
        """A step, forward and backward, that leaves no gradients."""

        def run() -> None:
            self.forward(contestant.layer).backward(self.gradient)
            self._drop_gradients(contestant)

        return run

    def trace(self, contestant: Contestant) -> tuple[Trace, Tensor]:
        """What a step does, and its output; it leaves the gradients."""
        outputs: list[Tensor] = []

        def forward() -> Tensor:
            self._drop_gradients(contestant)
            output = self.forward(contestant.layer)
            outputs[:] = [output.detach()]
            return output

        owned = [*contestant.layer.parameters(), *contestant.parameters]
        self._drop_gradients(contestant)  # else a GPU's memory before the step has them, and the step seems to need less
        return traced(forward, self.gradient, owned, self.device), outputs[0]

    def _drop_gradients(self, contestant: Contestant) -> None:
        for tensor in (self.x, *contestant.parameters):
            tensor.grad = None


def frozen_contestant(layer: nn.Module) -> Contestant:
    """The layer alone."""
    return Contestant(setting=None, way=FROZEN, layer=layer)


def contestant_on(layer: nn.Module, setting: Setting, name: str, way: Way, values: dict[str, Tensor]) -> Contestant:
    """A copy of the layer, adapted in a way that has these values."""
    layer = twin(layer)
    adapter = way(layer, setting).to(next(iter(values.values())).device)
    take_over(adapter, values)
    return Contestant(setting=setting, way=name, layer=layer, adapter=adapter)


def factor_values(layer: nn.Module, setting: Setting, precision: Precision, seed: int = 0) -> dict[str, Tensor]:
    """Random values of a setting's factors as after training, none of them zero, in the precision's dtype."""
    generator, device = torch.Generator().manual_seed(seed), next(layer.parameters()).device
    return {
        name: (torch.randn(factor.shape, generator=generator) * SIZE).to(device, precision.factors)
        for name, factor in bare_adapter(layer, setting).factors().items()
    }


def interleaved(
    runs: Sequence[Callable[[], object]], device: str, *, seconds: float, repeats: Sequence[int] | None = None
) -> list[list[float]]:
    """Seconds of each run, one entry a turn, as many turns as fit in `seconds` within bounds; a timing is the mean of its repeats."""
    found: list[list[float]] = [[] for _ in runs]
    order, started = random.Random(0), time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() - started > seconds:
            break
        for index in order.sample(range(len(runs)), len(runs)):
            found[index].append(seconds_of(runs[index], device, repeats[index] if repeats else 1))
    return found


def timings(ground: Ground, contestants: Sequence[Contestant], seconds: float) -> list[list[float]]:
    """Seconds of each contestant's step, one entry a turn."""
    runs = [ground.runner(contestant) for contestant in contestants]
    repeats = [repeats_for(run, ground.device) for run in runs]  # this is the warm-up too
    return interleaved(runs, ground.device, seconds=seconds, repeats=repeats)


def _output_shape(shape: Shape) -> tuple[int, ...]:
    return (1, shape.out, shape.side, shape.side) if shape.side else (1, shape.tokens, shape.out)
