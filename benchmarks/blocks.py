"""One block at full width, its base weights packed or its forward compiled: `python -m benchmarks.blocks`.

SDXL's transformer block of width 1280 over 1024 positions, and a transformer of Anima with one block of width 2048 over 1024 positions,
random weights, float32, one thread. A step is forward and backward, of the frozen block with the gradient of its input. All run by turns;
figures are medians of ratios to the frozen block within a turn, and the weights' bytes. Ten minutes.
Writes `benchmarks/results/blocks.json` and a Markdown table to the screen.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

import networks
from benchmarks.contest import interleaved
from benchmarks.results import FOLDER, machine
from benchmarks.step_models import TRANSFORMER_SIZE, transformer_subject
from library.core.quantised import FormName, pack_layers
from library.training.precision import weight_bytes

WIDTH, HEADS, POSITIONS, WORDS, TEXT = 1280, 20, 1024, 77, 2048  # of SDXL's block
SIDE = 64  # of Anima's latents: 1024 positions
LINEARS = [".*(to_q|to_k|to_v|to_out\\.0|net\\.0\\.proj|net\\.2)"]
NETWORKS: dict[str, Any] = {"frozen": None, "LoRA": "lora", "LoHa": "loha", "LoKr": "lokr"}
Base = Literal["dense", "compiled"] | FormName
BASES: tuple[Base, ...] = ("dense", *get_args(FormName), "compiled")
RANK, ALPHA = 16, 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network on a base: seconds of its steps turn by turn, and the bytes of the base's weights."""

    family: str
    network: str
    base: Base
    seconds: list[float]
    weight_bytes: int


def sdxl_block() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """SDXL's block and a pass over it."""
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    block = BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=TEXT).requires_grad_(False)
    x, text = torch.randn(1, POSITIONS, WIDTH).requires_grad_(), torch.randn(1, WORDS, TEXT)
    return block, lambda model: model(x, encoder_hidden_states=text).square().mean()


def anima_block() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Anima's transformer with one block and a pass over it."""
    subject = transformer_subject(TRANSFORMER_SIZE | {"num_layers": 1}, SIDE, 1, "cpu", torch.float32)
    return subject.denoiser, subject.loss


FAMILIES = {"SDXL": sdxl_block, "Anima": anima_block}


def runners(family: str) -> Iterator[tuple[str, Base, nn.Module, Callable[[], object]]]:
    """Every network on every base, each a model of its own, with what makes a step of it."""
    for network in NETWORKS:
        for base in BASES:
            if base == "compiled" and shutil.which("g++") is None:
                continue
            model, loss = FAMILIES[family]()
            if base in get_args(FormName):
                pack_layers(model, cast(FormName, base))
            adapted = None
            if NETWORKS[network] is not None:
                torch.manual_seed(0)
                adapted = networks.create_network(model, NETWORKS[network], rank=RANK, alpha=ALPHA, target_modules=LINEARS)
                adapted.attach()
            if base == "compiled":
                _compile(model)
            yield network, base, model, _step(model, loss, adapted)


def _compile(model: nn.Module) -> None:
    """As the trainer does: the forward of each block."""
    blocks = getattr(model, "transformer_blocks", [model])
    for block in blocks:
        block.forward = torch.compile(block.forward)


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor], adapted: Any) -> Callable[[], object]:
    def step() -> None:
        for parameter in adapted.parameters() if adapted is not None else ():
            parameter.grad = None
        loss(model).backward()

    return step


def measure(family: str, seconds: float) -> list[Row]:
    """The rows of one block; each run warms up once, which compiles what is to be compiled."""
    taking_part = list(runners(family))
    for *_, step in taking_part:
        step()
    times = interleaved([step for *_, step in taking_part], "cpu", seconds=seconds)
    return [
        Row(family=family, network=network, base=base, seconds=spent, weight_bytes=weight_bytes(model))
        for (network, base, model, _), spent in zip(taking_part, times, strict=True)
    ]


def report(rows: Sequence[Row]) -> str:
    """A table a family: the time over the dense frozen block's, by network and base; the last line is the base's weights over dense."""
    parts = []
    for family in dict.fromkeys(row.family for row in rows):
        own = {(row.network, row.base): row for row in rows if row.family == family}
        bases = [base for base in BASES if ("frozen", base) in own]
        frozen = own["frozen", "dense"]
        lines = [f"| {family} | {' | '.join(bases)} |", "| --- |" + " --- |" * len(bases)]
        for network in NETWORKS:
            lines.append(f"| {network} | {' | '.join(_ratio(own[network, base], frozen) for base in bases)} |")
        sizes = (own["frozen", base].weight_bytes / frozen.weight_bytes for base in bases)
        lines.append(f"| weights | {' | '.join(f'{size:.2f}' for size in sizes)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _ratio(row: Row, base: Row) -> str:
    return f"{statistics.median(own / other for own, other in zip(row.seconds, base.seconds, strict=True)):.2f}"


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=180, help="of timing for each family; there are at least three turns")
    parser.add_argument("--output", type=Path, default=FOLDER / "blocks.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for family in options.family:
        rows += measure(family, options.seconds)
        facts = {"machine": machine("cpu"), "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(family, file=sys.stderr, flush=True)
    print(report(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
