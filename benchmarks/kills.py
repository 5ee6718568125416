"""Runs killed with SIGKILL and resumed, against runs that never were: `python -m benchmarks.kills`.

A short run of the shipped script on the small models of `assets/` (two epochs; caches on disk, networks and states saved between steps and
after epochs, averaged weights, previews, validation) is made once without a kill. Then it is killed again and again: at chosen instants of
every phase (before and after a sync, a rename, a forward, a sampler's pass ...), and at moments that another process draws. Each time
`--resume auto` brings it to its end, and every file that it leaves is compared byte for byte; of the log what it says, but for times. The
dates in files are pinned by SOURCE_DATE_EPOCH. Writes `benchmarks/results/kills.json` and a Markdown table to the screen.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results import FOLDER, machine
from tools.demo import MODELS, ROOT
from tools.toys.pictures import caption, draw, random_picture

NAME = "net"
SIZES = ((64, 64), (64, 64), (64, 64), (96, 64), (96, 64), (64, 64), (64, 96), (64, 64), (64, 64), (96, 64))
TIMED = ("seconds", "speed/", "memory/")  # what no two runs share in a line of the log
SESSION = ("begun", "resumed")  # events that say which session wrote
OPTIONS = (
    "--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
    "--max_train_epochs", "2", "--seed", "1", "--ema_decay", "0.9", "--save_every_n_epochs", "1", "--save_every_n_steps", "3",
    "--save_state", "--validation_split", "0.2", "--validate_every_n_steps", "2", "--sample_every_n_steps", "2",
    "--cache_latents_to_disk", "--max_data_loader_n_workers", "1", "--output_name", NAME,
)  # fmt: skip
NETWORKS: dict[str, tuple[str, ...]] = {
    "sdxl": ("--network_module", "networks.loha"),
    "anima": (
        "--network_module", "networks.lokr", "--network_args", "factor=4", "--network_train_unet_only",
        "--cache_text_encoder_outputs_to_disk",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: where it landed, whether the instant was chosen or drawn by the clock, and which files then came out differently."""

    family: str
    phase: str
    instant: str
    chosen: bool
    resumed_from: str  # the state that `--resume auto` took; empty where there was none
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Watched:
    """A run under `kill_driver`: the instants that it passed, each with its phase, whether it was killed, its seconds from the first on."""

    instants: list[tuple[str, str]]
    was_killed: bool
    seconds: float


@dataclass(frozen=True)
class Scene:
    """One run in a folder of its own, which `reset` empties: the same paths every time."""

    family: str
    folder: Path

    @property
    def output(self) -> Path:
        """Where the run writes."""
        return self.folder / "output"

    def reset(self) -> None:
        """Pictures and prompts as at the beginning; nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        pictures = self.folder / "pictures"
        pictures.mkdir(parents=True)
        generator = np.random.default_rng(7)
        for index, size in enumerate(SIZES):
            picture = random_picture(generator)
            draw(picture, seed=index).resize(size, Image.Resampling.BICUBIC).save(pictures / f"{index:02d}.png")
            (pictures / f"{index:02d}.txt").write_text(caption(picture) + "\n", encoding="utf-8")
        lines = ["[general]", "resolution = 64", 'caption_extension = ".txt"', "enable_bucket = true", "min_bucket_reso = 32", ""]
        lines += ["[[datasets]]", "batch_size = 2", "", "[[datasets.subsets]]", f"image_dir = {json.dumps(str(pictures))}"]
        (self.folder / "dataset.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "prompts.txt").write_text("a red circle on a mint background --w 64 --h 64 --s 3 --d 1\n", encoding="utf-8")

    def command(self) -> list[str]:
        """The options of the run."""
        files = ("--dataset_config", f"{self.folder}/dataset.toml", "--sample_prompts", f"{self.folder}/prompts.txt")
        return [*MODELS[self.family], *files, "--output_dir", str(self.output), *NETWORKS[self.family], *OPTIONS]

    def script(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Run the shipped script to its end."""
        return subprocess.run(
            [sys.executable, f"{self.family}_train_network.py", *self.command(), *more], cwd=ROOT, env=_environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    def watched(self, number: int = -1, seconds: float | None = None) -> Watched:
        """Run under `kill_driver`, killed at an instant, or some seconds after the program is loaded, where it gets so far."""
        trace, log = self.folder / "trace.txt", self.folder / "watched.log"
        command = [sys.executable, "-m", "benchmarks.kill_driver", self.family, str(trace), str(number), *self.command()]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=output, stderr=output)
            while not trace.exists() and process.poll() is None:
                time.sleep(0.02)
            begun = time.monotonic()
            if seconds is not None:
                time.sleep(seconds)
                process.send_signal(signal.SIGKILL)
            status = process.wait()
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{self.family}: ended with {status}\n{log.read_text(errors='replace')[-3000:]}")
        lines = trace.read_text(encoding="utf-8").splitlines() if trace.exists() else []
        instants = [(phase, what) for phase, what in (line.split("\t") for line in lines)]
        return Watched(instants, status != 0, time.monotonic() - begun)

    def outcome(self) -> dict[str, str]:
        """SHA-256 of every trained file and picture by name, and of what the log says."""
        files = sorted(path for path in self.output.rglob("*") if path.suffix in (".safetensors", ".png") and "-state" not in str(path))
        found = {str(path.relative_to(self.output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        log = self.output / f"{NAME}-run" / "log.jsonl"
        said = "\n".join(filter(None, map(_untimed, log.read_text(encoding="utf-8").splitlines())))
        return found | {"log.jsonl": hashlib.sha256(said.encode()).hexdigest()}


def reference(scene: Scene) -> tuple[dict[str, str], Watched]:
    """What a run that nobody kills leaves, and such a run. Raises `RuntimeError` where two of them differ."""
    scene.reset()
    done = scene.script()
    if done.returncode != 0:
        raise RuntimeError(f"{scene.family}: the run ended with {done.returncode}\n{done.stderr[-3000:]}")
    whole = scene.outcome()
    scene.reset()
    watched = scene.watched()
    if differing(whole, scene.outcome()):
        raise RuntimeError(f"{scene.family}: two runs that nobody killed differ in {differing(whole, scene.outcome())}")
    return whole, watched


def killed(scene: Scene, whole: dict[str, str], *, number: int = -1, seconds: float | None = None) -> Kill:
    """One run killed and resumed, compared with what a whole run leaves. Raises `RuntimeError` where it cannot be resumed."""
    watched = Watched([], False, 0.0)
    while not watched.was_killed:
        scene.reset()
        watched = scene.watched(number, seconds)
        number, seconds = number * 9 // 10, None if seconds is None else 0.9 * seconds  # for a run that was over before
    phase, instant = (watched.instants or [("starting", "before the first instant")])[-1]
    done = scene.script("--resume", "auto")
    if done.returncode != 0:
        raise RuntimeError(
            f"{scene.family}, killed while {phase} ({instant}): resuming ended with {done.returncode}\n{done.stderr[-3000:]}"
        )
    states = [word.rstrip(":,;") for line in done.stderr.splitlines() if "resum" in line for word in line.split() if "-state" in word]
    return Kill(
        family=scene.family, phase=phase, instant=instant, chosen=seconds is None,
        resumed_from=Path(states[0]).name if states else "", differing=differing(whole, scene.outcome()),
    )  # fmt: skip


def differing(one: dict[str, str], other: dict[str, str]) -> tuple[str, ...]:
    """The names of files that are not the same in both."""
    return tuple(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)))


def chosen_instants(instants: Sequence[tuple[str, str]], count: int, generator: random.Random) -> list[int]:
    """Numbers of instants, drawn from each phase in turn."""
    phases = {phase: [number for number, (own, _) in enumerate(instants) if own == phase] for phase, _ in instants}
    for numbers in phases.values():
        generator.shuffle(numbers)
    turns = [numbers[turn] for turn in range(len(instants)) for numbers in phases.values() if turn < len(numbers)]
    return turns[:count]


def measure(family: str, folder: Path, *, chosen: int, drawn: int, seed: int) -> list[Kill]:
    """The kills of one family, told on the screen as they come."""
    generator, scene = random.Random(seed), Scene(family, folder / family)
    whole, watched = reference(scene)
    kills = []
    places = [{"number": number} for number in chosen_instants(watched.instants, chosen, generator)]
    for place in [*places, *({"seconds": generator.random() * watched.seconds} for _ in range(drawn))]:
        kills.append(killed(scene, whole, **place))  # pyright: ignore[reportArgumentType]
        print(kills[-1], file=sys.stderr, flush=True)
    return kills


def report(kills: Sequence[Kill]) -> str:
    """A table: how many kills landed in each phase, at which instants, and how many ended with equal bytes."""
    lines = ["| family | killed while | kills | at | resumed from a state | equal bytes |", "| --- | --- | --- | --- | --- | --- |"]
    for family, phase in dict.fromkeys((kill.family, kill.phase) for kill in kills):
        own = [kill for kill in kills if (kill.family, kill.phase) == (family, phase)]
        instants = Counter(kill.instant for kill in own)
        at = ", ".join(f"{instant} x{count}" if count > 1 else instant for instant, count in sorted(instants.items()))
        equal, resumed = sum(not kill.differing for kill in own), sum(bool(kill.resumed_from) for kill in own)
        lines.append(f"| {family} | {phase} | {len(own)} | {at} | {resumed} | {equal} |")
    equal = sum(not kill.differing for kill in kills)
    return "\n".join([*lines, f"| **all** | | {len(kills)} | | {sum(bool(kill.resumed_from) for kill in kills)} | {equal} |"])


def main(argv: Sequence[str]) -> None:
    """Kill, resume, compare; write the results, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--chosen", type=int, default=28, help="kills at instants of every phase, for each family")
    parser.add_argument("--drawn", type=int, default=7, help="kills by the clock, for each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "kills.json")
    options = parser.parse_args(argv)
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as scratch:
        for family in options.family:
            kills += measure(family, Path(scratch), chosen=options.chosen, drawn=options.drawn, seed=options.seed)
            facts = {"machine": machine("cpu"), "kills": [asdict(kill) for kill in kills]}
            options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(report(kills))


def _environment() -> dict[str, str]:
    return os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}


def _untimed(line: str) -> str:
    said = json.loads(line)
    if said.get("event") in SESSION:
        return ""
    return json.dumps({name: value for name, value in said.items() if not name.startswith(TIMED)})


if __name__ == "__main__":
    main(sys.argv[1:])
