"""What a run has left in its folders: log, lock file, saved files, previews. Damage is told, and the rest read."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from library.training.optimizing.average import AVERAGED
from library.training.reproduction.lock import LOCK, RESUMED, Lock

LOG = "log.jsonl"
SUFFIX = "-run"
FACTS = ("step", "epoch", "seconds", "event")  # of every line; all else are figures
CLOCKS_DIFFER = 5.0  # seconds that the clock of a disk may be behind
MOST_DAMAGED = 5  # lines that are named
PREVIEW = re.compile(
    r"_(?P<moment>e?\d{6})_(?P<number>\d+)(?:_x(?P<strength>-?\d+(?:\.\d+)?))?_(?P<date>\d{14})_(?P<seed>\d+)(?:_\d+)?\.png"
)


class Point(NamedTuple):
    """A figure after a step."""

    step: int
    value: float  # nan where it was not finite


class Event(NamedTuple):
    """Something that happened after a step."""

    what: str
    step: int
    epoch: int
    seconds: float
    facts: dict[str, Any]


class Preview(NamedTuple):
    """A picture drawn while training."""

    path: Path
    number: int  # of the prompt and seed
    strength: float | None  # where it is another than the usual one
    moment: str  # as the file says: a step, or e and an epoch
    step: int  # the last of an epoch; of one that the log does not know, the last of all
    seed: int
    date: str


@dataclass
class Log:
    """The lines of `log.jsonl`."""

    figures: dict[str, list[Point]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    last_step: int = 0
    seconds: float = 0.0
    ends_of_epochs: dict[int, int] = field(default_factory=dict)  # the last step of each, as far as there are lines
    problems: list[str] = field(default_factory=list)

    @property
    def has_stopped(self) -> bool:
        """Did the run say that it ended before its last step, and has not gone on since?"""
        return bool(self.events) and self.events[-1].what == "stopped"


@dataclass(kw_only=True)
class RunFiles:
    """A run as it lies on the disk."""

    name: str
    folder: Path  # that of the trained files
    log: Log
    lock: Lock | None
    steps: int | None  # to be made in all; of the last session, which may have made the run longer
    saved: list[Path]
    previews: list[Preview]
    problems: list[str]

    @property
    def own_folder(self) -> Path:
        """The folder of its log and lock file."""
        return self.folder / f"{self.name}{SUFFIX}"


def runs_in(folder: Path) -> list[str]:
    """The names of the runs whose files are in an output folder."""
    return sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}") if path.is_dir())


def find_run(given: Path, name: str | None) -> tuple[Path, str]:
    """Output folder and name of the run that a path means: an output folder, or the `-run` folder in it.

    Raises `ValueError` that names the runs there are where it is none of them, or several.
    """
    given = given.resolve()
    if not given.is_dir():
        raise ValueError(f"{given}: no such folder; give the output folder of a run, or its {SUFFIX} folder")
    if given.name.endswith(SUFFIX) and ((given / LOG).exists() or (given / LOCK).exists()):
        return given.parent, given.name.removesuffix(SUFFIX)
    names = runs_in(given)
    if not names:
        raise ValueError(f"{given}: holds no run (a folder that ends with {SUFFIX}); give the --output_dir of a run")
    if name is None and len(names) > 1:
        raise ValueError(f"{given}: holds {len(names)} runs; choose one with --name: {', '.join(names)}")
    if name is not None and name not in names:
        raise ValueError(f"--name {name}: {given} holds {', '.join(names)}")
    return given, name or names[0]


def read_run(folder: Path, name: str) -> RunFiles:
    """Everything that the run has left so far."""
    own, problems = folder / f"{name}{SUFFIX}", []
    log = read_log(own / LOG)
    lock = None
    try:
        lock = Lock.read(own / LOCK, "lock file")
    except ValueError as error:
        problems.append(str(error))
    own_files = (path for path in folder.glob("*.safetensors") if _is_of(path, name) and not _is_older(path, log))
    saved = sorted(own_files, key=lambda path: path.stat().st_mtime)
    previews = [preview for preview in _previews(folder / "sample", name, log) if not _is_older(preview.path, log)]
    return RunFiles(
        name=name, folder=folder, log=log, lock=lock, steps=_steps(own, lock), saved=saved, previews=previews, problems=problems
    )


def read_log(path: Path) -> Log:
    """The lines of a log. Those that are damaged are counted and named; a last one that is cut off is a run in progress or killed."""
    log = Log()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        log.problems.append(f"{path.name}: cannot be read ({error.strerror or error})")
        return log
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is not None:
            _take(log, entry)
        elif number == len(lines) and not line.endswith(b"\n"):
            log.problems.append(f"{path.name}: the last line (line {number}) is cut off")
        else:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:MOST_DAMAGED])) + (", ..." if len(damaged) > MOST_DAMAGED else "")
        log.problems.append(f"{path.name}: {len(damaged)} of {len(lines)} lines are damaged and left out: {shown}")
    return log


def _entry(line: bytes) -> dict[str, Any] | None:
    """The object of a line, if it has a step."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    is_sound = isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("epoch", 0), int)
    return entry if is_sound and isinstance(entry.get("seconds", 0), int | float) else None


def _take(log: Log, entry: dict[str, Any]) -> None:
    step, epoch, seconds = entry["step"], entry.get("epoch", 0), float(entry.get("seconds", 0.0))
    log.last_step, log.seconds = max(log.last_step, step), max(log.seconds, seconds)
    if "event" in entry:
        facts = {key: value for key, value in entry.items() if key not in FACTS}
        log.events.append(Event(str(entry["event"]), step, epoch, seconds, facts))
        return
    log.ends_of_epochs[epoch] = max(step, log.ends_of_epochs.get(epoch, 0))
    for key, value in entry.items():
        if key not in FACTS:
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue  # a text is no figure
            log.figures.setdefault(key, []).append(Point(step, number if math.isfinite(number) else math.nan))


def _steps(folder: Path, lock: Lock | None) -> int | None:
    """How many steps the run shall have."""
    try:
        last = Lock.read(folder / RESUMED, "lock file") if (folder / RESUMED).exists() else lock
    except ValueError:  # damaged: that of the beginning tells all but a longer run
        last = lock
    steps = None if last is None else last.run.get("steps")
    return steps if isinstance(steps, int) else None


def _is_older(path: Path, log: Log) -> bool:
    """Is a file from before the log began? Then an earlier run of the same name left it."""
    begun = next((event.facts.get("time") for event in log.events if event.what == "begun"), None)
    return isinstance(begun, int | float) and path.stat().st_mtime < begun - CLOCKS_DIFFER


def _is_of(path: Path, name: str) -> bool:
    """Is a file one of the run's: the final one, an epoch's, a step's, or the average beside one of them?"""
    starts = {name} | ({"epoch", "at"} if name == "last" else set())
    pattern = rf"({'|'.join(map(re.escape, sorted(starts)))})(-\d{{6}}|-step\d{{8}})?({AVERAGED})?\.safetensors"
    return re.fullmatch(pattern, path.name) is not None


def _previews(folder: Path, name: str, log: Log) -> Iterable[Preview]:
    """The previews, the newest of each place."""
    newest: dict[tuple[str, int, float | None], Preview] = {}
    for path in folder.glob(f"{_globbed(name)}_*.png"):
        found = PREVIEW.fullmatch(path.name.removeprefix(name))
        if found is None:
            continue
        moment, strength = found["moment"], found["strength"]
        is_epoch = moment.startswith("e")
        step = log.ends_of_epochs.get(int(moment[1:]), log.last_step) if is_epoch else int(moment)
        preview = Preview(
            path, int(found["number"]), None if strength is None else float(strength), moment, step, int(found["seed"]), found["date"]
        )
        place = (moment, preview.number, preview.strength)
        if place not in newest or newest[place].date < preview.date:
            newest[place] = preview
    return sorted(newest.values(), key=lambda preview: (preview.step, preview.moment, preview.number))


def _globbed(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)
