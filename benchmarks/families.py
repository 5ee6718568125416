"""A training step of each family's small model, through the real training loop: `python -m benchmarks.families`.

Batches of 8 toy pictures of 64x64, latents and text cached, one thread. Each case runs in a process of its own, whose peak memory is
told; a step's seconds are those the process computed, the median over the steps after the first five. Positions are those of the latents.
Writes `benchmarks/results/families.json` and a table to the screen.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from library.core.command_line import parse_command_line
from library.models.architecture import architecture_named
from library.training import run
from tools.demo import MODELS, ROOT, make_dataset

RESULTS = ROOT / "benchmarks" / "results" / "families.json"
BATCH, SIDE, STEPS, WARM = 8, 64, 45, 5
NETWORKS: dict[str, list[str]] = {"networks.lora": [], "networks.loha": [], "networks.lokr": ["--network_args", "factor=4"]}


def measured(family: str, network: str, folder: str) -> dict[str, Any]:
    """Seconds of a step, pictures and latent positions a second, and the peak of the process in MB."""
    torch.set_num_threads(1)
    arch = architecture_named(family)
    argv = [
        *MODELS[family], "--dataset_config", f"{folder}/dataset.toml", "--output_dir", f"{folder}/out", "--network_module", network,
        "--network_dim", "8", "--network_alpha", "4", "--network_train_unet_only", "--max_train_steps", str(STEPS), "--seed", "1",
        "--cache_latents", "--cache_text_encoder_outputs", "--console_log_level", "WARNING", *NETWORKS[network],
    ]  # fmt: skip
    seconds: list[float] = []
    update = run.update

    def timed(*given: Any) -> Any:
        started = time.process_time()
        figures = update(*given)
        seconds.append(time.process_time() - started)
        return figures

    run.update = timed
    run.train(arch, parse_command_line(run.option_groups(arch), argv, prog="benchmark", about="benchmark"))
    step = statistics.median(seconds[WARM:])
    positions = BATCH * (SIDE // arch.pixels_per_latent) ** 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"family": family, "network": network, "step": step, "pictures": BATCH / step, "positions": positions / step, "peak_mb": peak}


def main() -> None:
    """Run every case once."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        make_dataset(Path(scratch), seed=7)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
            for family in MODELS:
                rows += [processes.submit(measured, family, network, scratch).result() for network in NETWORKS]
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("| family | network | step, s | pictures/s | latent positions/s | peak, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        figures = f"{row['step']:.3f} | {row['pictures']:.1f} | {row['positions']:.0f} | {row['peak_mb']:.0f}"
        print(f"| {row['family']} | {row['network']} | {figures} |")


if __name__ == "__main__":
    sys.exit(main())
