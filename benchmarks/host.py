"""What an adapted layer costs the host, whatever its size: `python -m benchmarks.host`.

A layer of 32 x 32 and 4 tokens, where products take no time: Python, autograd and torch's dispatcher do. Beside ours a plain swap of
`forward`, as other tools do it. Overhead is what a way takes beyond the torch operations that it ends in, when these are called one after
the other and without autograd. Kernels are operations that would launch one on a GPU, of the layer and its adapter together.
Seconds that this process computed, the least of many turns. Half precision goes the way it goes where it is not emulated.
Writes `benchmarks/results/host.json` and a table to the screen.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import results
from benchmarks.contest import Contestant, Ground, contestant_on, factor_values, frozen_contestant
from benchmarks.peers import OURS, Setting, ours, sd_scripts
from benchmarks.shapes import PRECISIONS, Precision, Shape
from library.core.text_table import table
from networks.kernels import products

RESULTS = results.FOLDER / "host.json"
SHAPE = Shape(out=32, inner=32, tokens=4)
SWAP = "swap"
WAYS = {OURS: partial(ours, path="factored"), SWAP: sd_scripts}  # so small a layer would take the way through dW
SETTINGS = (
    Setting(algorithm="lora", rank=4),
    Setting(algorithm="loha", rank=4),
    Setting(algorithm="lokr", rank=2, factor=4),
    Setting(algorithm="lokr", factor=4, is_full=True),
)
KERNELS = {"lora": 10, "loha": 20, "lokr": 20}  # the most that issue 4 allows
CALLS_A_TURN = 15
BINDINGS = {"_to_copy": "to"}  # operation -> method of a tensor, where their names differ
PLACES = ("device", "layout", "pin_memory")  # arguments that the methods do not all take, and that change nothing on a CPU


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Microseconds of a way's forward and of its step (forward and backward), and of the operations that these end in."""

    precision: str
    setting: str
    way: str
    forward: float
    step: float
    forward_calls: float
    step_calls: float
    kernels: int
    most_kernels: int | None

    @property
    def forward_overhead(self) -> float:
        return self.forward - self.forward_calls

    @property
    def step_overhead(self) -> float:
        return self.step - self.step_calls


class Calls(TorchDispatchMode):
    """Every operation that torch runs, as the call that Python code would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name: str = func._schema.name.partition("::")[2]
        call = getattr(Tensor, BINDINGS.get(name, name), None) or getattr(torch, name, func)
        self.found.append(partial(call, *args, **{key: value for key, value in kwargs.items() if key not in PLACES}))
        return func(*args, **kwargs)

    def repeat(self) -> None:
        """All of them again, past autograd."""
        with torch.no_grad():
            for call in self.found:
                call()


def costs(precision: Precision, turns: int) -> Iterator[Cost]:
    """The frozen layer, then every setting in both ways."""
    ground = Ground.of(SHAPE, precision)
    contestants = [frozen_contestant(ground.layer)]
    for setting in SETTINGS:
        values = factor_values(ground.layer, setting, precision)
        contestants += [contestant_on(ground.layer, setting, name, way, values) for name, way in WAYS.items()]
    runs = [run for contestant in contestants for run in _runs(ground, contestant)]
    times = _least(runs, turns)
    for contestant, (forward, step, forward_calls, step_calls) in zip(contestants, zip(*[iter(times)] * 4, strict=True), strict=True):
        setting = contestant.setting
        yield Cost(
            precision=precision.title,
            setting="" if setting is None else setting.title,
            way=contestant.way,
            forward=forward,
            step=step,
            forward_calls=forward_calls,
            step_calls=step_calls,
            kernels=ground.trace(contestant)[0].kernels,
            most_kernels=None if setting is None else KERNELS[setting.algorithm],
        )


def _runs(ground: Ground, contestant: Contestant) -> list[Callable[[], object]]:
    """Forward, forward and backward, and the bare operations of both."""
    leaves = [ground.x, *contestant.parameters]

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if ground.precision.is_autocast else nullcontext():
            return contestant.layer(ground.x)

    def step() -> None:
        torch.autograd.grad(forward(), leaves, ground.gradient)

    calls = []
    for run in (forward, step):
        with Calls() as recorded:
            run()
        calls.append(recorded.repeat)
    return [forward, step, *calls]


def _least(runs: list[Callable[[], object]], turns: int) -> list[float]:
    """The least microseconds of each run over turns in which all of them take part."""
    best = [float("inf")] * len(runs)
    for _ in range(turns):
        for index, run in enumerate(runs):
            started = time.process_time()
            for _ in range(CALLS_A_TURN):
                run()
            best[index] = min(best[index], (time.process_time() - started) / CALLS_A_TURN)
    return [round(1e6 * seconds, 1) for seconds in best]


def lines(found: list[Cost]) -> list[list[str]]:
    """The table: microseconds and kernels, and the goals of issue 4."""
    swaps = {(cost.precision, cost.setting): cost for cost in found if cost.way == SWAP}
    return [_line(cost, swaps.get((cost.precision, cost.setting)) if cost.way == OURS else None) for cost in found]


def _line(cost: Cost, swap: Cost | None) -> list[str]:
    figures = [cost.forward, cost.step, cost.forward_overhead, cost.step_overhead]
    ratios, goals = ["", "", ""], ["", ""]
    if swap is not None and cost.most_kernels is not None:
        forward, step = cost.forward_overhead / swap.forward_overhead, cost.step_overhead / swap.step_overhead
        ratios = [f"{ratio:.2f}" for ratio in (cost.step / swap.step, forward, step)]
        goals = ["met" if is_met else "missed" for is_met in (max(forward, step) <= 1, cost.kernels <= cost.most_kernels)]
    return [cost.precision, cost.setting, cost.way, *(f"{figure:.0f}" for figure in figures), *ratios, str(cost.kernels), *goals]


HEADER = [
    "precision", "setting", "way", "forward us", "step us", "forward overhead", "step overhead",
    "step / swap", "forward overhead / swap", "step overhead / swap", "kernels", "overhead goal", "kernel goal",
]  # fmt: skip


def main() -> None:
    """Measure, write the results, print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description="What an adapted layer costs the host.")
    parser.add_argument("--turns", type=int, default=300, help="how often everything is measured; the least time counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with mock.patch.object(products, "_is_emulated", lambda dtype: False):
        found = [cost for precision in PRECISIONS.values() for cost in costs(precision, options.turns)]
    facts = results.machine("cpu") | {"shape": SHAPE.title, "turns": options.turns}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts | {"rows": [asdict(cost) for cost in found]}, indent=1) + "\n", encoding="utf-8")
    print(table(HEADER, lines(found)))
    print(facts)


if __name__ == "__main__":
    sys.exit(main())
