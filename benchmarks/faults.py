"""What a fault costs a saved state: `python -m benchmarks.faults [--size MB] [--large MB] [--seed N] [--tmpfs FOLDER]`.

A state is truncated at every hundredth of each of its files, and in each file so many bits are flipped one at a time; after each the
folder is verified, and what `--resume auto` would take is asked. Disks that fill up at every twentieth of a state are played by a limit
on the size of files, and on a small tmpfs (`--tmpfs` names an empty folder to mount one on, which needs root): the state before must
stay whole. Last, the seconds that a large state takes, beside writing, syncing and hashing as many bytes. Prints Markdown tables and
writes `benchmarks/results/faults.json`.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.results import FOLDER, machine, markdown
from library.core.disk_space import amount
from library.training.state.folder import BrokenState, Manifest, StateNames, verified
from library.training.state.resuming import newest_state
from library.training.state.saving import write_state

RESULTS = FOLDER / "faults.json"
FLIPS = 200  # bits of a file that are flipped, one at a time
CUTS, FILLS = 100, 20  # lengths of a file, and of a disk
TURNS = 5


@dataclass(kw_only=True)
class Tally:
    """What became of one kind of fault in one file."""

    fault: str
    file: str
    tried: int = 0
    noticed: int = 0  # verified and refused
    named: int = 0  # with the file in the message
    recovered: int = 0  # `--resume auto` takes the state before

    def count(self, folder: Path, names: StateNames) -> None:
        """Look at a damaged state."""
        self.tried += 1
        try:
            verified(folder)
        except BrokenState as error:
            self.noticed += 1
            self.named += self.file in str(error)
        found = newest_state(names)
        self.recovered += found is not None and found.manifest is not None and found.manifest.step == 1


def manifest(step: int) -> Manifest:
    """The manifest of a state that the benchmark writes."""
    return Manifest(
        made_by="benchmark", kind="step", stands="step", step=step, epoch=1, saved_at=step, session="1", seed=1, identity={"a": 1}, files={}
    )


def saved(names: StateNames, step: int, size: int) -> Path:
    """A state of `size` bytes of weights, and twice as many of the optimizer."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(size // 4, generator=generator)
    content = {"weights": {"a": weights}, "optimizer": {"state": {0: {"exp_avg": weights, "exp_avg_sq": weights + 1}}, "param_groups": []}}
    place = names.place("step", step=step, epoch=1)
    write_state(place, content, manifest(step))
    return place


def damage(names: StateNames, seed: int) -> Iterator[Tally]:
    """Every file of the newer of two states truncated, flipped and taken away, and put right again."""
    place, draw = names.place("step", step=2, epoch=1), random.Random(seed)
    for path in sorted(place.iterdir()):
        content = path.read_bytes()
        cut, flipped = Tally(fault="truncated", file=path.name), Tally(fault="one bit flipped", file=path.name)
        gone = Tally(fault="missing", file=path.name)
        for length in sorted({len(content) * part // CUTS for part in range(CUTS)} | {len(content) - 1}):
            path.write_bytes(content[:length])
            cut.count(place, names)
        for _ in range(FLIPS):
            damaged, bit = bytearray(content), draw.randrange(8 * len(content))
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            flipped.count(place, names)
        path.unlink()
        gone.count(place, names)
        path.write_bytes(content)
        yield from (cut, flipped, gone)


def fill(names: StateNames, size: int, full_at: Callable[[int], AbstractContextManager[None]]) -> Counter[str]:
    """Replace a state while the disk has room for a part of it only, more and more."""
    found: Counter[str] = Counter()
    place = saved(names, 1, size)
    total = sum(path.stat().st_size for path in place.iterdir())
    for part in range(1, FILLS):
        before = {path.name: path.read_bytes() for path in place.iterdir()}
        with full_at(total * part // FILLS):
            try:
                write_state(place, _content_of(size, part), manifest(1))
                outcome = "written"
            except ValueError as error:
                outcome = str(error).split("(")[-1].split(")")[0] if "could not be written" in str(error) else "refused before"
        whole = {path.name: path.read_bytes() for path in place.iterdir()} == before
        left = [path.name for path in names.folder.iterdir() if path != place and path.name.startswith(".net")]
        found[f"{outcome}; the state before {'whole' if whole else 'CHANGED'}; {'leftovers' if left else 'nothing left over'}"] += 1
    return found


def _content_of(size: int, number: int) -> dict:
    return {"weights": {"a": torch.full((size // 4,), float(number))}, "optimizer": {"b": torch.zeros(size // 2)}}


def cost(size: int, turns: int) -> dict[str, list[float]]:
    """Seconds to save a state of so many bytes, and to write, sync and hash as many in one piece, turn by turn."""
    found: dict[str, list[float]] = {"state": [], "one file, synced, hashed": []}
    piece = torch.randn(size // 4).numpy().tobytes()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        names, plain = StateNames(Path(folder), "net"), Path(folder) / "plain"
        for _ in range(turns):
            started = time.perf_counter()
            saved(names, 1, size // 3)
            found["state"].append(time.perf_counter() - started)
            started = time.perf_counter()
            with plain.open("wb") as file:
                file.write(piece)
                os.fsync(file.fileno())
            hashlib.sha256(piece)
            found["one file, synced, hashed"].append(time.perf_counter() - started)
    return found


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may become larger than a third of `size`, as each of a state's is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(4096, size // 3), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def filled(folder: Path, size: int) -> Iterator[None]:
    """A disk on which `size` bytes are free."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.truncate(0)
        file.write(b"\0" * max(0, shutil.disk_usage(folder).free - size))
    try:
        yield
    finally:
        ballast.unlink()


def main() -> None:
    """Run all, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=float, default=0.25, help="MB of weights")
    parser.add_argument("--large", type=float, default=300, help="MB of the state that is timed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tmpfs", type=Path, help="an empty folder to mount a small disk on")
    options = parser.parse_args()
    size = int(options.size * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        names = StateNames(Path(folder), "net")
        for step in (1, 2):
            saved(names, step, size)
        tallies = list(damage(names, options.seed))
    rows = [[tally.fault, tally.file, *map(str, (tally.tried, tally.noticed, tally.named, tally.recovered))] for tally in tallies]
    print(markdown(["fault", "file", "tried", "noticed", "file named", "state before taken"], rows))
    fills = {"limit on the size of files": _on_a_folder(size)}
    if options.tmpfs is not None:
        fills["tmpfs of 64 MB"] = _on_a_tmpfs(options.tmpfs, size)
    print()
    print(markdown(["disk", f"outcome of replacing a state of {amount(3 * size)}", "times"],
                   [[disk, outcome, str(count)] for disk, found in fills.items() for outcome, count in sorted(found.items())]))  # fmt: skip
    seconds = cost(int(options.large * 2**20), TURNS)
    print()
    print(
        markdown(
            ["what", f"seconds for {options.large:g} MB"], [[what, f"{statistics.median(took):.2f}"] for what, took in seconds.items()]
        )
    )
    damaged = [asdict(tally) for tally in tallies]
    content = {"facts": machine("cpu"), "damage": damaged, "full_disk": fills, "seconds": seconds, "large_mb": options.large}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(tally.tried != tally.noticed or tally.tried != tally.recovered for tally in tallies))


def _on_a_folder(size: int) -> Counter[str]:
    with tempfile.TemporaryDirectory() as folder:
        return fill(StateNames(Path(folder), "net"), size, limited)


def _on_a_tmpfs(folder: Path, size: int) -> Counter[str]:
    """With no reserve, so that the disk really fills up while a state is written."""
    import library.core.disk_space as disk_space

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    real, disk_space.shortage = disk_space.shortage, lambda *arguments: 0
    try:
        return fill(StateNames(folder, "net"), size, lambda free: filled(folder, free))
    finally:
        disk_space.shortage = real
        subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    main()
