"""Merge a LoKr into a U-Net of SDXL's full size, against plain copies: `python -m benchmarks.merge_speed`.

The weights are random fp16 numbers, 5 GB of them in the original's layout. On disk all are timed to the end of their fsync, in turn;
in memory it is the arithmetic alone, layer by layer. GB count the weights once. Medians of all rounds; `best` is the fastest
round, in memory the sum of every layer's fastest, for machines that do other work meanwhile.
Writes `benchmarks/results/merge_speed.json` and a table to the screen.
"""

import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from library.core.tensor_stream import Entry, write_stream
from library.core.text_table import table
from library.models.naming import Naming, Place, naming_named
from networks import lokr
from networks.checkpoint_merge import Change, Merge, merge_into, merged_tensor
from networks.network import Network
from tools.demo import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "merge_speed.json"
TIMES = 3
TILE = 1 << 22  # random numbers, repeated
WHOLE = 100_000  # a rank at which LoKr stores its second factor whole


def write_weights(path: Path, naming: Naming, tile: Tensor) -> int:
    """A file with the denoiser's tensors at full size; its bytes."""
    part, module = naming.outline()[0]
    places, state = naming.places(part, module), module.state_dict()
    entries = [Entry(place.key, torch.float16, tuple(state[name].shape)) for name, place in places.items()]
    return write_stream(path, entries, (random_tensor(entry.shape, tile) for entry in entries)).size


def random_tensor(shape: tuple[int, ...], tile: Tensor) -> Tensor:
    """A tensor of the tile's numbers."""
    numbers = torch.Size(shape).numel()
    return tile.repeat(numbers // TILE + 1)[:numbers].reshape(shape)


def make_network(naming: Naming) -> Network:
    """A LoKr on every layer of the denoiser, filled as after training."""
    network = lokr.create_network(1.0, WHOLE, 1.0, None, None, naming.outline()[0][1], factor=8, conv_dim=WHOLE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    return network


def copy_file(source: Path, target: Path) -> None:
    """A plain copy, to the end of its fsync."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def on_disk(folder: Path, naming: Naming, tile: Tensor) -> tuple[dict[str, list[float]], int]:
    """Seconds of a plain copy, of our stream without and with the adapter, and the file's bytes."""
    source, target = folder / "base.safetensors", folder / "out.safetensors"
    size = write_weights(source, naming, tile)
    network = make_network(naming)
    ways: dict[str, Callable[[], object]] = {
        "file copy": lambda: copy_file(source, target),
        "stream without adapters": lambda: merge_into(source, target, naming, network.parts, []),
        "stream with LoKr": lambda: merge_into(source, target, naming, network.parts, [Merge(members=network.members, strength=0.8)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMES):
        for name, run in ways.items():
            target.unlink(missing_ok=True)
            seconds[name].append(timed(run))
    return seconds, size


def in_memory(naming: Naming, tile: Tensor) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Seconds of copying the adapted weights and of merging into them by round, the sums of the layers' fastest, and the bytes."""
    network = make_network(naming)
    merge = Merge(members=network.members, strength=0.8)
    layers: dict[str, list[list[float]]] = {"copy": [], "merge of LoKr": []}
    for member in network.members:
        change = {Place("weight"): [Change(member.adapter, merge, "weight")]}
        copied, merged = [], []
        for _ in range(TIMES):
            weight = random_tensor(member.adapter.shape.weight, tile)
            copied.append(timed(weight.clone))
            merged.append(timed(lambda weight=weight, change=change: merged_tensor(weight, change, torch.float16)))
        layers["copy"].append(copied)
        layers["merge of LoKr"].append(merged)
    rounds = {name: [sum(times, 0.0) for times in zip(*values, strict=True)] for name, values in layers.items()}
    fastest = {name: sum((min(times) for times in values), 0.0) for name, values in layers.items()}
    return rounds, fastest, sum(2 * torch.Size(member.adapter.shape.weight).numel() for member in network.members)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def rows_of(where: str, rounds: dict[str, list[float]], fastest: dict[str, float], size: int) -> list[dict[str, object]]:
    """One row a way, each against the first, which is the copy."""
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    copy = next(iter(rounds))
    return [
        {
            "where": where,
            "what": name,
            "seconds": round(median, 2),
            "GB/s": round(size / median / 1e9, 2),
            "copies": round(median / medians[copy], 1),
            "best seconds": round(fastest[name], 2),
            "best GB/s": round(size / fastest[name] / 1e9, 2),
            "best copies": round(fastest[name] / fastest[copy], 1),
        }
        for name, median in medians.items()
    ]


def main() -> None:
    """Measure, write the results, print them."""
    naming = naming_named("sdxl")
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).half() * 0.02
    with tempfile.TemporaryDirectory(dir=os.environ.get("MERGE_SPEED_DIR")) as scratch:
        seconds, size = on_disk(Path(scratch), naming, tile)
    rows = rows_of("disk", seconds, {name: min(values) for name, values in seconds.items()}, size)
    rows += rows_of("memory", *in_memory(naming, tile))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {"bytes": size, "rounds": TIMES, "threads": torch.get_num_threads(), "torch": torch.__version__, "peak memory in bytes": peak}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts | {"seconds on disk": seconds, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    print(facts)


if __name__ == "__main__":
    sys.exit(main())
