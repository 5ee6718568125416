"""What precision and memory options do to a training step, through the real loop: `python -m benchmarks.run_options`.

The small models of `assets/`, batches of 8 toy pictures of 64x64, latents and text cached, on the CPU, one thread; LyCORIS' own module
trains in the same loop beside ours. Each case runs in a process of its own. A step's seconds are those the process computed, the median
over the steps after the warm-up; its peak is the most bytes that torch's allocator held at once in a step, beyond what it held before.
Everything is told as a ratio to LoRA in float32 without options. A quarter of an hour; what a CPU cannot do (swapped blocks, offloaded
checkpoints) is not here, and packed weights, which layers of small models are not, stand in `benchmarks.blocks`.
Writes `benchmarks/results/run_options.json` and Markdown tables to the screen.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import allocator_peak
from benchmarks.results import FOLDER, machine
from library.core.command_line import parse_command_line
from library.models.architecture import architecture_named
from library.training import run
from tools.demo import MODELS, make_dataset

THREADS = 1
STEPS, WARM = 20, 5
NETWORKS: dict[str, tuple[str, ...]] = {
    "LoRA": ("networks.lora",),
    "LoHa": ("networks.loha",),
    "LoKr": ("networks.lokr", "--network_args", "factor=4"),
    "LyCORIS LoHa": ("lycoris.kohya", "--network_args", "algo=loha"),
    "LyCORIS LoKr": ("lycoris.kohya", "--network_args", "algo=lokr", "factor=4"),
}
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16": ("--mixed_precision", "bf16"),
    "bf16, adapters too": ("--mixed_precision", "bf16", "--full_bf16"),
    "bf16, fp8 base": ("--mixed_precision", "bf16", "--fp8_base"),
}
MEMORY: dict[str, tuple[str, ...]] = {
    "checkpointing": ("--gradient_checkpointing",),
    "budget 75%": ("--activation_memory_budget", "75%"),
    "budget 50%": ("--activation_memory_budget", "50%"),
    "fused backward": ("--fused_backward_pass", "--max_grad_norm", "0"),
    "compiled": ("--compile",),
}
OURS = ("LoRA", "LoHa", "LoKr")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: which model, which network, and which options."""

    family: str
    network: str
    precision: str = "float32"
    memory: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a case took: seconds of a step, its peak in bytes, the loss of its last step; or why it could not run."""

    case: Case
    seconds: float = 0.0
    peak_bytes: int = 0
    loss: float = 0.0
    refused: str = ""


def cases(families: Sequence[str]) -> Iterator[Case]:
    """Every network in every precision, then ours with every memory option."""
    for family in families:
        yield from (Case(family=family, network=network, precision=precision) for network in NETWORKS for precision in PRECISIONS)
        yield from (Case(family=family, network=network, memory=memory) for network in OURS for memory in MEMORY)


def measured(case: Case, folder: str) -> Row:
    """Train a little and measure; the last step is made under the profiler and not timed."""
    torch.set_num_threads(THREADS)
    arch = architecture_named(case.family)
    argv = [
        *MODELS[case.family], "--dataset_config", f"{folder}/dataset.toml", "--output_dir", f"{folder}/out", "--network_dim", "8",
        "--network_alpha", "4", "--network_train_unet_only", "--max_train_steps", str(STEPS), "--seed", "1",
        "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk",
        "--console_log_level", "ERROR", "--network_module", *NETWORKS[case.network], *PRECISIONS[case.precision],
        *(MEMORY[case.memory] if case.memory else ()),
    ]  # fmt: skip
    seconds: list[float] = []
    peaks: list[int] = []
    update = run.update

    def timed(*given: Any) -> Any:
        figures: list[Any] = []
        started = time.process_time()
        if len(seconds) == STEPS - 1:
            peaks.append(allocator_peak(lambda: figures.append(update(*given))))
        else:
            figures.append(update(*given))
            seconds.append(time.process_time() - started)
        return figures[0]

    run.update = timed
    try:
        result = run.train(arch, parse_command_line(run.option_groups(arch), argv, prog="benchmark", about="benchmark"))
    except ValueError as error:
        return Row(case=case, refused=str(error))
    return Row(case=case, seconds=statistics.median(seconds[WARM:]), peak_bytes=peaks[0], loss=result.losses[-1])


def report(rows: Sequence[Row]) -> str:
    """One table a family: a step's time and peak over those of LoRA in float32."""
    parts = []
    for family in dict.fromkeys(row.case.family for row in rows):
        own = [row for row in rows if row.case.family == family]
        base = own[0]
        parts += [f"**{family}**: LoRA in float32 takes {base.seconds:.3f} s a step, {base.peak_bytes / 1e6:.1f} MB at its peak", ""]
        networks = list(dict.fromkeys(row.case.network for row in own))
        parts += [f"| options | {' | '.join(networks)} |", "| --- |" + " --- |" * len(networks)]
        for kind in dict.fromkeys((row.case.precision, row.case.memory) for row in own):
            found = {row.case.network: row for row in own if (row.case.precision, row.case.memory) == kind}
            cells = (_cell(found.get(network), base) for network in networks)
            parts.append(f"| {', '.join(filter(None, kind))} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _cell(row: Row | None, base: Row) -> str:
    if row is None:
        return ""
    return "refused" if row.refused else f"{row.seconds / base.seconds:.2f}, {row.peak_bytes / base.peak_bytes:.2f}"


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print the tables (time, then peak)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_options", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=FOLDER / "run_options.json")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        make_dataset(Path(scratch), seed=7)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
            for case in cases(options.family):
                rows.append(processes.submit(measured, case, scratch).result())
                print(case, rows[-1].refused, file=sys.stderr, flush=True)
                facts = {"machine": machine("cpu") | {"threads": THREADS}, "rows": [asdict(row) for row in rows]}
                options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(report(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
