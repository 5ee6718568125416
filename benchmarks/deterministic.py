"""What `--deterministic` costs a training step, and what it gives, through the real loop: `python -m benchmarks.deterministic`.

The small models of `assets/`, batches of 8 toy pictures of 64x64, latents and text cached, on the GPU if there is one, else on one thread
of the CPU. Within one run the switch is turned on for one step of each two, in changing order, so that what slows the machine for a while
slows both; told is the median of the ratios of neighbours, and their quartiles. Then each case trains twice with the option and twice
without, and losses are compared bit by bit. Some minutes. Writes `benchmarks/results/deterministic.json` and a Markdown table.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from benchmarks.results import FOLDER, machine, markdown, rounded
from library.core.command_line import parse_command_line
from library.models.architecture import architecture_named
from library.training import run
from tools.demo import MODELS, make_dataset

STEPS, WARM, SHORT = 44, 4, 6  # of the timed run, of those not counted, and of the runs that are compared
NETWORKS: dict[str, tuple[str, ...]] = {
    "LoRA": ("networks.lora",),
    "LoHa": ("networks.loha",),
    "LoKr": ("networks.lokr", "--network_args", "factor=4"),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One family and network: the time of a step with the switch over that without, and whether runs repeat themselves."""

    family: str
    network: str
    seconds: float  # of a step without
    ratio: float
    quartiles: tuple[float, float]
    repeats_with: bool
    repeats_without: bool
    same_losses: bool  # with and without


def cost(family: str, network: str, folder: Path) -> Cost:
    """Measure one case."""
    steps = timed(family, network, folder)
    pairs = [(a, b) if on else (b, a) for (on, a), (_, b) in zip(steps[WARM::2], steps[WARM + 1 :: 2], strict=True)]
    ratios = [switched / plain for switched, plain in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    with_it = [losses(family, network, folder, "--deterministic") for _ in range(2)]
    torch.use_deterministic_algorithms(False)
    without = [losses(family, network, folder) for _ in range(2)]
    return Cost(
        family=family,
        network=network,
        seconds=rounded(statistics.median(plain for _, plain in pairs)),
        ratio=rounded(middle),
        quartiles=(rounded(low), rounded(high)),
        repeats_with=with_it[0] == with_it[1],
        repeats_without=without[0] == without[1],
        same_losses=with_it[0] == without[0],
    )


def timed(family: str, network: str, folder: Path) -> list[tuple[bool, float]]:
    """A run whose steps have the switch on and off by turns (on, off, off, on, ...); of each step whether it was on, and its seconds."""
    found: list[tuple[bool, float]] = []
    update = run.update

    def step(*given: Any) -> Any:
        is_on = len(found) % 4 in (0, 3)
        torch.use_deterministic_algorithms(is_on)
        started = _clock()
        figures = update(*given)
        found.append((is_on, _clock() - started))
        return figures

    run.update = step
    try:
        losses(family, network, folder, "--max_train_steps", str(STEPS))
    finally:
        run.update = update
        torch.use_deterministic_algorithms(False)
    return found


def losses(family: str, network: str, folder: Path, *extra: str) -> list[float]:
    """The losses of a short run."""
    arch = architecture_named(family)
    argv = [
        *MODELS[family], "--dataset_config", f"{folder}/dataset.toml", "--output_dir", f"{folder}/out", "--network_dim", "8",
        "--network_alpha", "4", "--network_train_unet_only", "--max_train_steps", str(SHORT), "--seed", "1",
        "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk",
        "--console_log_level", "ERROR", "--network_module", *NETWORKS[network], *extra,
    ]  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return run.train(arch, parse_command_line(run.option_groups(arch), argv, prog="benchmark", about="benchmark")).losses


def report(costs: Sequence[Cost]) -> str:
    """The table."""
    said = {True: "yes", False: "no"}
    header = ["family", "network", "s a step", "with / without", "quartiles", "repeats itself with", "without", "same losses"]
    rows = [
        [
            each.family, each.network, f"{each.seconds:.3f}", f"{each.ratio:.3f}", f"{each.quartiles[0]:.3f} to {each.quartiles[1]:.3f}",
            said[each.repeats_with], said[each.repeats_without], said[each.same_losses],
        ]
        for each in costs
    ]  # fmt: skip
    return markdown(header, rows)


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deterministic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--network", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=FOLDER / "deterministic.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as scratch:
        make_dataset(Path(scratch), seed=7)
        for family in options.family:
            for network in options.network:
                costs.append(cost(family, network, Path(scratch)))
                print(costs[-1], file=sys.stderr, flush=True)
                facts = {"machine": machine(device), "costs": [asdict(each) for each in costs]}
                options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(report(costs))


def _clock() -> float:
    """Seconds of this process; on a GPU seconds on the wall, once all is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main(sys.argv[1:])
