"""Merge a LoKr into a U-Net of SDXL's full size, against a plain copy of the same file: `python -m benchmarks.merge_speed`.

The weights are random fp16 numbers, 5 GB of them in the original's layout. All are timed to the end of their fsync, in turn, and the
median counts; `in memory` is the arithmetic alone, against a plain copy of the same tensors.
Writes `benchmarks/results/merge_speed.json` and a table to the screen.
"""

import json
import os
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
from library.models.naming import Naming, naming_named
from networks import lokr
from networks.checkpoint_merge import Change, Merge, merge_into, merged_tensor
from networks.network import Network
from tools.demo import ROOT
from tools.merge_adapters import keep_freed_memory

RESULTS = ROOT / "benchmarks" / "results" / "merge_speed.json"
TIMES = 3
TILE = 1 << 22  # random numbers, repeated


def entries_of(naming: Naming) -> list[Entry]:
    """The denoiser's tensors at full size, by their keys."""
    part, module = naming.outline()[0]
    places, state = naming.places(part, module), module.state_dict()
    return [Entry(place.key, torch.float16, tuple(state[name].shape)) for name, place in places.items()]


def random_tensor(entry: Entry, tile: Tensor) -> Tensor:
    """A tensor of the entry's shape, of the tile's numbers."""
    numbers = torch.Size(entry.shape).numel()
    return tile.repeat(numbers // TILE + 1)[:numbers].reshape(entry.shape)


def make_network(naming: Naming) -> Network:
    """A LoKr with whole factors on every layer of the denoiser, filled as after training."""
    part, module = naming.outline()[0]
    network = lokr.create_network(1.0, 100_000, 1.0, None, None, module, factor=8, conv_dim=100_000)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    return network


def copy_file(source: Path, target: Path) -> None:
    """A plain copy, to the end of its fsync."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def in_memory(network: Network, tile: Tensor) -> tuple[float, float, int]:
    """Seconds of merging all layers one by one, seconds of copying their weights, and their bytes."""
    merge = Merge(members=network.members, strength=0.8)
    merged = copied = 0.0
    size = 0
    for member in network.members:
        entry = Entry(member.target.name, torch.float16, member.adapter.shape.weight)
        weight = random_tensor(entry, tile)
        target = torch.empty_like(weight).copy_(weight)
        started = time.perf_counter()
        target.copy_(weight)
        copied += time.perf_counter() - started
        started = time.perf_counter()
        merged_tensor(weight, entry, {None: [Change(member.adapter, merge, "weight")]}, Path("memory"))
        merged += time.perf_counter() - started
        size += entry.size
    return merged, copied, size
