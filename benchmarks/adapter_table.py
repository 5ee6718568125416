"""What each algorithm costs: parameters and file size on full-size SDXL, time of a layer's step: `python -m benchmarks.adapter_table`.

Sizes are those of networks made on the meta device (U-Net, 722 layers). Times are forward and backward of one adapted layer over those
of the frozen layer alone, which has no weight gradient either: all variants take turns in one process, medians of their ratios within a
turn; what this thread computed, float32, gradients to the input and the adapter. Writes `benchmarks/results/adapter_table.json` and a
Markdown table to the screen.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.models.naming import naming_named
from networks import loha, lokr, lora
from networks.base import Adapter

RESULTS = Path(__file__).parent / "results" / "adapter_table.json"
TURNS, WARM_UP = 15, 2


@dataclass(frozen=True)
class Variant:
    """An algorithm with its settings."""

    title: str
    module: Any
    algorithm: type[Adapter]
    rank: int
    arguments: dict[str, Any]

    def adapter(self, layer: nn.Module) -> Adapter:
        """A fresh one on a layer."""
        return self.algorithm.fresh("x", layer, self.rank, 1.0, self.algorithm.Arguments(**self.arguments))


VARIANTS = (
    Variant("LoRA rank 16", lora, lora.LoRA, 16, {}),
    Variant("LoRA rank 16, DoRA", lora, lora.LoRA, 16, {"dora_wd": True}),
    Variant("LoHa rank 8", loha, loha.LoHa, 8, {}),
    Variant("LoHa rank 32", loha, loha.LoHa, 32, {}),
    Variant("LoKr factor 8, rank 16", lokr, lokr.LoKr, 16, {"factor": 8}),
    Variant("LoKr factor 8, whole", lokr, lokr.LoKr, 16, {"factor": 8, "full_matrix": True}),
    Variant("LoKr factor -1, whole", lokr, lokr.LoKr, 16, {"full_matrix": True}),
)
SHAPES = {
    "Linear 640 x 640, 1024 tokens": (lambda: nn.Linear(640, 640), (1, 1024, 640)),
    "Linear 1280 x 1280, 1024 tokens": (lambda: nn.Linear(1280, 1280), (1, 1024, 1280)),
    "Linear 1280 to 10240, 256 tokens": (lambda: nn.Linear(1280, 10240), (1, 256, 1280)),
    "Conv 3x3 640, 32 x 32": (lambda: nn.Conv2d(640, 640, 3, padding=1), (1, 640, 32, 32)),
}


def sizes(variant: Variant) -> tuple[int, float]:
    """Parameters of a network on the full-size SDXL U-Net, and megabytes of its fp16 file."""
    unet = next(module for part, module in naming_named("sdxl").outline() if part.is_denoiser)
    arguments = {name: value for name, value in variant.arguments.items() if name != "dora_wd"}  # needs weights; 1 number a row
    with torch.device("meta"):
        network = variant.module.create_network(1.0, variant.rank, 1.0, None, None, unet, **arguments)
    count = sum(parameter.numel() for parameter in network.parameters())
    if "dora_wd" in variant.arguments:
        count += sum(adapter.shape.out for adapter in network.adapters)
    return count, count * 2 / 1e6


def step_time(layer: nn.Module, x: Tensor, adapter: Adapter | None) -> float:
    """Seconds of one forward and backward."""
    if adapter is not None:
        adapter.attach()
    started = time.thread_time()
    layer(x).sum().backward()
    seconds = time.thread_time() - started
    if adapter is not None:
        adapter.detach()
        adapter.zero_grad()
    x.grad = None
    return seconds


def ratios(make: Any, shape: tuple[int, ...]) -> dict[str, float]:
    """The median of each variant's time over the frozen layer's, taken turn by turn."""
    torch.manual_seed(0)
    layer = make().requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    adapters = {variant.title: variant.adapter(layer) for variant in VARIANTS}
    found: dict[str, list[float]] = {title: [] for title in adapters}
    for turn in range(TURNS + WARM_UP):
        base = statistics.median(step_time(layer, x, None) for _ in range(3))
        for title, adapter in adapters.items():
            ratio = step_time(layer, x, adapter) / base
            if turn >= WARM_UP:
                found[title].append(ratio)
    return {title: round(statistics.median(values), 2) for title, values in found.items()}


def main() -> None:
    """Measure, write the results and print the table."""
    torch.set_num_threads(1)
    times = {name: ratios(make, shape) for name, (make, shape) in SHAPES.items()}
    table = {}
    for variant in VARIANTS:
        count, megabytes = sizes(variant)
        table[variant.title] = {
            "parameters": count,
            "fp16 file, MB": round(megabytes, 1),
            "times": {name: times[name][variant.title] for name in SHAPES},
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "table": table}, indent=1) + "\n", encoding="utf-8")
    print("| | parameters | fp16 file | " + " | ".join(SHAPES) + " |")
    print("| --- |" + " --- |" * (len(SHAPES) + 2))
    for title, row in table.items():
        cells = " | ".join(f"{row['times'][name]:.2f}" for name in SHAPES)
        print(f"| {title} | {row['parameters'] / 1e6:.1f} M | {row['fp16 file, MB']:.0f} MB | {cells} |")


if __name__ == "__main__":
    sys.exit(main())
