"""How well the cost model chooses: every way to a delta measured on every shape, `python -m benchmarks.paths`.

For each layer, number of tokens and adapter, every way is forced in turn and timed (forward and backward, thread time, medians). The
regret is the time of the way that the model takes over that of the fastest, frozen layer included: 1.00 where it chose right.
Writes `benchmarks/results/paths.json` and a table of the choices that cost something to the screen. One thread, float32.
"""

import json
import statistics
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import repeats_for, seconds_of
from benchmarks.results import FOLDER, machine
from library.core.text_table import table
from networks.base import Adapter
from networks.kernels.choice import Choice
from networks.kernels.cost import Setting
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA

SHAPES = ((640, 640), (1280, 1280), (10240, 1280), (1280, 5120), (1280, 2048), (2048, 2048))
TOKENS = (16, 77, 256, 1024)
LARGEST = 1 << 31  # of tokens * out * inner: beyond, a turn takes too long on a CPU
TURNS = 3
ADAPTERS: dict[str, tuple[type[Adapter], int, dict[str, Any]]] = {
    "LoRA rank 16": (LoRA, 16, {}),
    **{f"LoHa rank {rank}": (LoHa, rank, {}) for rank in (4, 8, 16, 32)},
    **{f"LoKr factor {factor}, whole": (LoKr, 16, {"factor": factor, "full_matrix": True}) for factor in (-1, 4, 8, 16)},
    **{f"LoKr factor {factor}, rank 16": (LoKr, 16, {"factor": factor}) for factor in (4, 8)},
}


class Forced(Choice):
    """A choice that has been made."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.only = way

    def way(self, adapter: Adapter, x: Tensor, base: Any) -> str:
        """Always the same."""
        return self.only


def times(out: int, inner: int, tokens: int, name: str) -> dict[str, float]:
    """Seconds of every way, and which one the model takes (`chosen`)."""
    algorithm, rank, arguments = ADAPTERS[name]
    layer = nn.Linear(inner, out).requires_grad_(False)
    x, grad = torch.randn(tokens, inner, requires_grad=True), torch.randn(tokens, out)
    adapter = algorithm.fresh("x", layer, rank, 1.0, algorithm.Arguments(**arguments))
    nn.init.normal_(next(adapter.parameters()))
    adapter.attach()
    layer(x)
    chosen, ways = adapter.choice.taken, adapter.ways
    assert ways is not None and chosen is not None

    def step(way: str) -> None:
        adapter.choice = Forced(way)
        torch.autograd.grad(layer(x), [x, *adapter.parameters()], grad)

    names = list(ways.costs(tokens, Setting.of("cpu", torch.float32, True)))
    found: dict[str, list[float]] = {way: [] for way in names}
    repeats = {way: repeats_for(lambda way=way: step(way)) for way in names}
    for _ in range(TURNS):
        for way in names:
            found[way].append(seconds_of(lambda way=way: step(way), repeats=repeats[way]))
    return {way: statistics.median(values) for way, values in found.items()} | {"chosen": names.index(chosen)}


def main() -> None:
    """Measure, write the results and print what could have been chosen better."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for out, inner in SHAPES:
        for tokens in (count for count in TOKENS if count * out * inner <= LARGEST):
            for name in ADAPTERS:
                found = times(out, inner, tokens, name)
                chosen = list(found)[int(found.pop("chosen"))]
                best = min(found, key=found.__getitem__)
                rows.append(
                    {
                        "layer": f"{out} x {inner}", "tokens": tokens, "adapter": name, "chosen": chosen, "fastest": best,
                        "regret": round(found[chosen] / found[best], 3),
                        "milliseconds": {way: round(time * 1e3, 3) for way, time in found.items()},
                    }
                )  # fmt: skip
    regrets = [row["regret"] for row in rows]
    summary = {
        "choices": len(rows),
        "median": statistics.median(regrets),
        "mean": round(statistics.mean(regrets), 3),
        "worst": max(regrets),
    }
    result = machine("cpu") | {"summary": summary, "rows": rows}
    (FOLDER / "paths.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    worse = sorted((row for row in rows if row["regret"] > 1.05), key=lambda row: -row["regret"])
    cells = [[row["layer"], row["tokens"], row["adapter"], row["chosen"], row["fastest"], row["regret"]] for row in worse]
    print(table(["layer", "tokens", "adapter", "chosen", "fastest", "regret"], [[str(cell) for cell in row] for row in cells]))
    print(summary)


if __name__ == "__main__":
    sys.exit(main())
