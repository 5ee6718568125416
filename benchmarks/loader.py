"""What the loader gives in a second, beside plain torch datasets over the same files: `python -m benchmarks.loader`.

JPEGs like photographs are made, or those of `--folder` taken, and brought to one square. Ours are the batches of a training run, with
captions, crops and all. Beside them a dataset of a few lines: Pillow and numpy (Lanczos), torchvision where it is installed (its
default, bilinear), and for latents one .npz an image. Images a second from a loader's making to its last batch, workers' start included,
the ways in turn, medians of all turns; and what share of the time a device would wait that takes `--step_ms` for a batch.
Writes `benchmarks/results/loader.json` and a table to the screen.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import results
from library.core.text_table import table
from library.data.building import build_training_data
from library.data.caches import fill_latents
from library.data.dataset import TrainingData
from library.data.images.files import files_in
from library.data.loader import batch_loader
from library.data.options import DataOptions

RESULTS = results.FOLDER / "loader.json"
OURS, LATENT_CHANNELS = "ours", 16
Loader = Callable[[int], Iterable[Any]]  # the batches of an epoch, from a number of workers


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one way gave with so many workers: images a second (median), seconds of each turn, and of the wait for the first batch."""

    source: str
    way: str
    workers: int
    images_per_second: float
    first_batch: float
    waiting: float  # share of the time that a device would have waited
    seconds: list[float]


class PlainImages(Dataset[Tensor]):
    """Images as most would write it: opened, brought to size by `transform`."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


class PlainLatents(Dataset[Tensor]):
    """Latents as sd-scripts keeps them: one .npz an image, which is read at each use."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with np.load(self.files[index]) as arrays:
            return torch.from_numpy(arrays["latents"])


# The files


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """JPEGs of smooth colours under fine noise, which take as long to decode as photographs of their size."""
    folder.mkdir(parents=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        grain = draw.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=92)


def encoded(pixels: Tensor) -> Tensor:
    """Stands for a VAE: latents of the right size."""
    return F.avg_pool2d(pixels, 8).mean(1, keepdim=True).repeat(1, LATENT_CHANNELS, 1, 1)


# The ways


def training_data(folder: Path, side: int, batch: int, cache: str = "") -> TrainingData:
    """A training run's data over a folder; `cache` is nothing, memory or disk."""
    options = DataOptions(
        train_data_dir=folder, resolution=side, train_batch_size=batch, cache_latents=bool(cache), cache_latents_to_disk=cache == "disk"
    )
    data = build_training_data(options, seed=1, resolution_step=32, default_resolution=side)
    if cache:
        fill_latents(data, encoded, identity="benchmark", to_disk=cache == "disk", batch_size=batch)
    return data


def with_pillow(image: Image.Image, side: int) -> Tensor:
    """Cover a square, crop its centre, -1 to 1."""
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1)


def with_torchvision(side: int) -> Callable[[Image.Image], Tensor]:
    """The same by torchvision's transforms."""
    from torchvision import transforms  # pyright: ignore[reportMissingImports]

    steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    return transforms.Compose(steps)


def ours(data: TrainingData, workers: int) -> Iterable[Any]:
    """An epoch of a training run."""
    return batch_loader(data, 0, workers=workers)


def plain(dataset: Dataset[Tensor], batch: int, workers: int) -> Iterable[Any]:
    """An epoch of a dataset of a few lines."""
    return DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, pin_memory=torch.cuda.is_available())


def image_ways(folder: Path, side: int, batch: int) -> dict[str, Loader]:
    """The ways to pixels."""
    data = training_data(folder, side, batch)
    files = [image.path for image in data.images]
    ways = {
        OURS: partial(ours, data),
        "Pillow": partial(plain, PlainImages(files, partial(with_pillow, side=side)), batch),
    }
    if importlib.util.find_spec("torchvision") is not None:
        ways["torchvision"] = partial(plain, PlainImages(files, with_torchvision(side)), batch)
    return ways


def latent_ways(folder: Path, scratch: Path, side: int, batch: int) -> dict[str, Loader]:
    """The ways to latents; the .npz files are written beside the scratch folder's other files."""
    on_disk, in_memory = (training_data(folder, side, batch, cache) for cache in ("disk", "memory"))
    assert in_memory.latents is not None
    files = []
    for index, image in enumerate(in_memory.images):
        files.append(scratch / f"{image.path.stem}.npz")
        np.savez(files[-1], latents=in_memory.latents.latents(index, False).latents.numpy())
    return {
        OURS: partial(ours, on_disk),
        "ours in memory": partial(ours, in_memory),
        "npz": partial(plain, PlainLatents(files), batch),
    }


# Measuring


def epoch_seconds(loader: Loader, workers: int, step: float = 0.0) -> tuple[float, float, float]:
    """Seconds of an epoch, of them those until the first batch, and those of waiting for the others while a device takes `step` each."""
    started = time.perf_counter()
    batches, waited = iter(loader(workers)), -1.0
    first = waited
    asked = started
    for _ in batches:
        now = time.perf_counter()
        first, waited = (now - started, 0.0) if first < 0 else (first, waited + now - asked)
        time.sleep(step)
        asked = time.perf_counter()
    return time.perf_counter() - started, first, waited


def rates(source: str, ways: dict[str, Loader], count: int, workers: list[int], turns: int, step: float) -> list[Rate]:
    """Every way with every number of workers, in turn; one that reads no file has no workers."""
    cases = [(way, number) for number in workers for way in ways if number == 0 or "memory" not in way]
    times: dict[tuple[str, int], list[tuple[float, float, float]]] = {case: [] for case in cases}
    for _ in range(turns):
        for way, number in cases:
            times[way, number].append(epoch_seconds(ways[way], number))
    waits = {case: epoch_seconds(ways[case[0]], case[1], step) for case in cases}
    return [_rate(source, case, count, times[case], waits[case]) for case in cases]


def _rate(
    source: str, case: tuple[str, int], count: int, times: list[tuple[float, float, float]], slowed: tuple[float, float, float]
) -> Rate:
    seconds, firsts, _ = zip(*times, strict=True)
    whole, first, waited = slowed
    return Rate(
        source=source,
        way=case[0],
        workers=case[1],
        images_per_second=results.rounded(count / statistics.median(seconds)),
        first_batch=results.rounded(statistics.median(firsts)),
        waiting=results.rounded(waited / (whole - first)),
        seconds=[results.rounded(value) for value in seconds],
    )


def lines(found: list[Rate]) -> list[list[str]]:
    """The table: rates, and ours over each other way (median over the turns)."""
    own = {(rate.source, rate.workers): rate for rate in found if rate.way == OURS}
    body = []
    for rate in found:
        beside = own[rate.source, rate.workers]
        faster = statistics.median(b / a for a, b in zip(beside.seconds, rate.seconds, strict=True))
        figures = [f"{rate.images_per_second:.1f}", f"{rate.first_batch:.2f}", f"{100 * rate.waiting:.0f} %"]
        body.append([rate.source, rate.way, str(rate.workers), *figures, "" if rate is beside else f"{faster:.2f}"])
    return body


HEADER = ["source", "way", "workers", "images/s", "first batch s", "device waits", "ours is faster by"]


def main() -> None:
    """Measure, write the results, print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description="Images a second from our loader and from plain ones.")
    parser.add_argument("--images", type=int, default=48, help="how many images to make")
    parser.add_argument("--size", type=int, nargs=2, default=(2400, 1600), metavar=("WIDTH", "HEIGHT"), help="their size")
    parser.add_argument("--folder", type=Path, help="take the images in this folder instead, in the subfolders <repeats>_<words>")
    parser.add_argument("--side", type=int, default=1024, help="side of the square that they are brought to")
    parser.add_argument("--batch", type=int, default=4, help="images a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2), help="numbers of worker processes")
    parser.add_argument("--turns", type=int, default=5, help="epochs that each way is timed for")
    parser.add_argument("--step_ms", type=float, default=500, help="what a device takes for a batch, for its waiting")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = options.folder or scratch / "images"
        if options.folder is None:
            make_photos(folder / "1_photo", options.images, *options.size)
        count = sum(len(files_in(each)) for each in folder.iterdir() if each.is_dir())
        measured = partial(rates, count=count, workers=list(options.workers), turns=options.turns, step=options.step_ms / 1000)
        found = measured("jpg", image_ways(folder, options.side, options.batch))
        found += measured("latents", latent_ways(folder, scratch, options.side, options.batch))
    chosen = {name: value for name, value in vars(options).items() if name != "folder"}
    facts = results.machine("cpu") | {"processors": os.cpu_count(), "images": count} | chosen
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts | {"rows": [asdict(rate) for rate in found]}, indent=1) + "\n", encoding="utf-8")
    print(table(HEADER, lines(found)))
    print(facts)


if __name__ == "__main__":
    sys.exit(main())
