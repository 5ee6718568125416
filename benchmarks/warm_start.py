"""How soon a run whose caches are on disk has its first batch, and what its index holds: `python -m benchmarks.warm_start`.

Small JPEGs with captions of some 200 letters are made, and both caches filled by stand-ins for the models, with entries as large as
SDXL's latents at `--side`. A new process then does what a training run does besides loading models: it finds and measures the images,
reads captions, checks both caches and puts the first batch together; a second one does so under tracemalloc, which counts what stays
in memory. The files are in the system's own cache by then: a cold disk takes longer. Once with the checks, once with
`--skip_cache_check`, and once with sd-scripts' npz files instead of entries.
Writes `benchmarks/results/warm_start.json` and a table to the screen.
"""

import argparse
import gc
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import results
from library.core.text_table import table
from library.data.building import build_training_data
from library.data.caches import NpzLatents, fill_latents, fill_text
from library.data.caches.npz import identical
from library.data.dataset import TrainingData
from library.data.images.files import files_in
from library.data.options import DataOptions

RESULTS = results.FOLDER / "warm_start.json"
CHANNELS, BATCH = 4, 4
NPZ = NpzLatents(suffix="_sdxl.npz", channels=CHANNELS, pixels=8, ready=identical)
CASES = {"our entries": [], "our entries, --skip_cache_check": ["--skip"], "npz of sd-scripts": ["--npz"]}


def make_images(folder: Path, count: int) -> None:
    """Small JPEGs of noise, each with a caption file."""
    folder.mkdir(parents=True)
    words = [f"word{number}" for number in range(300)]
    for number in range(count):
        draw = np.random.default_rng(number)
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number:05d}.jpg")
        tags = random.Random(number).sample(words, 24)
        (folder / f"{number:05d}.txt").write_text(f"image {number}, " + ", ".join(tags), encoding="utf-8")


def latents_of(pixels: Tensor) -> Tensor:
    """Stands for a VAE: latents of the right size."""
    return F.avg_pool2d(pixels, 8).mean(1, keepdim=True).repeat(1, CHANNELS, 1, 1)


def states_of(captions: list[str]) -> dict[str, Tensor]:
    """Stands for text encoders: rows for a short text."""
    letters = torch.tensor([[float(ord(letter)) for letter in caption[:77].ljust(77)] for caption in captions])
    return {"hidden_states": letters[:, :, None].repeat(1, 1, 16), "pooled": letters}


def started(folder: Path, side: int, skip: bool = False, npz: bool = False) -> tuple[TrainingData, dict[str, float]]:
    """All that a run does for its first batch besides loading models, and the seconds of each part."""
    options = DataOptions(
        train_data_dir=folder, resolution=side, train_batch_size=BATCH, caption_extension=".txt", cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True, skip_cache_check=skip,
    )  # fmt: skip
    times = [time.perf_counter()]
    data = build_training_data(options, seed=1, resolution_step=32, default_resolution=side)
    times.append(time.perf_counter())
    fill_latents(data, latents_of, identity="none" if npz else "benchmark", to_disk=True, batch_size=BATCH, npz=NPZ if npz else None)
    times.append(time.perf_counter())
    fill_text(data, states_of, identity="benchmark", to_disk=True, batch_size=256)
    times.append(time.perf_counter())
    data.batch(0, 0)
    times.append(time.perf_counter())
    names = ("images and captions", "latents", "text", "first batch")
    return data, {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)} | {
        "all": times[-1] - times[0]
    }


def write_npz(folder: Path, data: TrainingData) -> None:
    """The latents as sd-scripts keeps them, beside the images."""
    assert data.latents is not None
    for index, image in enumerate(data.images):
        width, height = image.size
        name = f"{image.path.stem}_{width:04d}x{height:04d}{NPZ.suffix}"
        np.savez(image.path.with_name(name), latents=data.latents.latents(index, False).latents.numpy(), original_size=np.array(image.size))


def measured(folder: Path, side: int, skip: bool, npz: bool, traced: bool) -> dict[str, float]:
    """Seconds of a start in this process, or what it leaves in memory in bytes an image."""
    if not traced:
        return started(folder, side, skip, npz)[1]
    started(folder, side, skip, npz)  # all is imported from here on
    tracemalloc.start()
    data, _ = started(folder, side, skip, npz)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    captions = sum(sys.getsizeof(image.caption) for image in data.images)
    return {"bytes": kept / len(data.images), "caption_bytes": captions / len(data.images)}


def in_new_process(folder: Path, side: int, *flags: str) -> dict[str, float]:
    """`measured` where nothing has been imported or kept yet."""
    command = [sys.executable, "-m", "benchmarks.warm_start", "--measure", str(folder), "--side", str(side), *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(count: int, side: int, turns: int) -> dict[str, Any]:
    """Make the files, fill the caches, start anew in every way."""
    work = Path(tempfile.mkdtemp(prefix="warm-start-"))
    try:
        make_images(work / "1_images", count)
        filling = started(work, side)[1]
        write_npz(work, started(work, side)[0])
        assert len(files_in(work / "1_images")) == count
        cases = {}
        for name, flags in CASES.items():
            times = [in_new_process(work, side, *flags) for _ in range(turns)]
            fastest = min(times, key=lambda each: each["all"])
            cases[name] = {"seconds": fastest, "turns": [each["all"] for each in times], **in_new_process(work, side, *flags, "--traced")}
        return {"images": count, "side": side, "filling": filling, "cases": cases}
    finally:
        shutil.rmtree(work)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the results, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="how many images")
    parser.add_argument("--side", type=int, default=512, help="of the square that all images go to")
    parser.add_argument("--turns", type=int, default=3, help="starts in each way; the fastest counts")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    for flag in ("--skip", "--npz", "--traced"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measured(options.measure, options.side, options.skip, options.npz, options.traced)))
        return
    found = run(options.images, options.side, options.turns)
    RESULTS.write_text(json.dumps(results.machine("cpu") | found, indent=1) + "\n", encoding="utf-8")
    parts = next(iter(found["cases"].values()))["seconds"].keys()
    rows = [
        [name, *(f"{case['seconds'][part]:.2f} s" for part in parts), f"{case['bytes']:.0f}", f"{case['caption_bytes']:.0f}"]
        for name, case in found["cases"].items()
    ]
    print(table(["with", *parts, "bytes an image", "of them its caption"], rows))


if __name__ == "__main__":
    main()
