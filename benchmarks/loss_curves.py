"""Loss curves of LoRA, LoHa, LoKr and lycoris.kohya on the small models, from the same seed: `python -m benchmarks.loss_curves`.

The data are toy pictures of the new look. Noise, timesteps and batches are the same for all, so the curves differ by the adapters
only. LyCORIS is told to adapt the layers that ours adapt (its preset attn-mlp).
Writes `benchmarks/results/loss_curves.json` and a table to the screen.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from accelerate.state import AcceleratorState

from library.core.command_line import parse_command_line
from library.core.log import get_logger
from library.models.architecture import architecture_named
from library.training.run import option_groups, train
from tools.demo import MODELS, ROOT, make_dataset

RESULTS = ROOT / "benchmarks" / "results" / "loss_curves.json"
STEPS, EVERY = 50, 10
NETWORKS = {
    "networks.lora": [],
    "networks.loha": [],
    "networks.lokr": ["--network_args", "factor=8"],
    "lycoris.kohya loha": ["--network_args", "algo=loha", "preset=attn-mlp"],
    "lycoris.kohya lokr": ["--network_args", "algo=lokr", "factor=8", "preset=attn-mlp"],
    "networks.lora on anima": [],
    "networks.loha on anima": [],
    "networks.lokr on anima": ["--network_args", "factor=8"],
}


def losses(name: str, extra: list[str], folder: Path) -> tuple[list[float], float]:
    """The losses of a run of `STEPS` steps, and its seconds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    family = name.partition(" on ")[2] or "sdxl"
    argv = [
        *MODELS[family], "--dataset_config", str(folder / "dataset.toml"),
        "--output_dir", str(folder / "out"), "--network_module", name.split()[0], "--network_dim", "8", "--network_alpha", "8",
        "--network_train_unet_only", "--learning_rate", "1e-3", "--max_train_steps", str(STEPS), "--seed", "1", "--cache_latents",
        "--console_log_level", "WARNING", *extra,
    ]  # fmt: skip
    arch = architecture_named(family)
    started = time.perf_counter()
    result = train(arch, parse_command_line(option_groups(arch), argv, prog="benchmark", about="benchmark"))
    return result.losses, time.perf_counter() - started


def main() -> None:
    """Run every network once and report means of `EVERY` steps."""
    get_logger("benchmarks")
    table: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dataset"
        make_dataset(folder, seed=7)
        for name, extra in NETWORKS.items():
            curve, seconds = losses(name, extra, folder)
            table[name] = {"losses": curve, "seconds": round(seconds, 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    spans = [f"{start + 1}-{start + EVERY}" for start in range(0, STEPS, EVERY)]
    print("| network | " + " | ".join(f"steps {span}" for span in spans) + " | seconds |")
    print("| --- |" + " --- |" * (len(spans) + 1))
    for name, row in table.items():
        curve = row["losses"]
        assert isinstance(curve, list)
        means = [sum(curve[start : start + EVERY]) / EVERY for start in range(0, STEPS, EVERY)]
        print(f"| {name} | " + " | ".join(f"{mean:.4f}" for mean in means) + f" | {row['seconds']} |")


if __name__ == "__main__":
    sys.exit(main())
