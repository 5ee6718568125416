"""What is told of a run in words and tables: its state, configuration, environment, inputs, events and files."""

import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from library.data.inspection.report_html import html_table
from library.training.reproduction.lock import Lock
from tools.run_report.charts import number_text
from tools.run_report.reading import LOG, Event, Log, RunFiles

QUIET = 180  # seconds without a line after which a run is not taken to be in progress
MOST_EVENTS = 200
MANY = 12  # entries of a table that stands open; longer ones unfold
MB = 2**20


@dataclass(frozen=True)
class Tile:
    """One number at the head of the page."""

    title: str
    value: str
    detail: str = ""


def tiles_html(run: RunFiles) -> str:
    """The numbers that one looks for first."""
    shown = "".join(
        f"<div><small>{escape(tile.title)}</small><b>{escape(tile.value)}</b><small>{escape(tile.detail)}</small></div>"
        for tile in _tiles(run)
    )
    return f'<div class="tiles">{shown}</div>'


def state_of(run: RunFiles) -> str:
    """Where the run is: finished, stopped, in progress, or ended early."""
    total = run.steps
    if total is not None and run.log.last_step >= total:
        return "finished"
    if run.log.has_stopped:
        return "stopped"
    written = (run.own_folder / LOG).stat().st_mtime if (run.own_folder / LOG).exists() else 0.0
    if not run.log.figures:
        return "not begun"
    return "in progress" if time.time() - written < QUIET else "ended early" if total is not None else "not known"


def configuration_html(lock: Lock | None) -> str:
    """The options that the run was given, and all others folded."""
    if lock is None:
        return '<p class="none">Not known: the run has no readable lock file.</p>'
    command = shlex.join(map(str, lock.run.get("command", ()))).replace(" --", " \\\n  --")
    return f"<pre>{escape(command)}</pre>{_pairs(lock.options, 'option')}" + _folded(
        f"{len(lock.defaults)} options at their defaults", _pairs(lock.defaults, "option")
    )


def environment_html(lock: Lock | None) -> str:
    """Versions, hardware, environment variables and inputs."""
    if lock is None:
        return '<p class="none">Not known: the run has no readable lock file.</p>'
    facts = {"started": lock.run.get("started"), "folder": lock.run.get("folder"), "processes": lock.run.get("processes"), **lock.hardware}
    rows = [[name, found.place, _size(found.bytes, found.images), found.digest[:16]] for name, found in lock.inputs.items()]
    inputs = html_table(["input", "where", "size", "digest"], rows)
    variables = _pairs(lock.environment, "variable") if lock.environment else '<p class="none">No environment variable that matters.</p>'
    columns = ("Machine", _pairs(facts, "fact")), ("Versions", _pairs(lock.versions, "package")), ("Environment variables", variables)
    beside = "".join(f"<div><h3>{title}</h3>{content}</div>" for title, content in columns)
    return f'<div class="columns">{beside}</div><h3>Inputs</h3>{inputs}'


def events_html(events: Sequence[Event]) -> str:
    """What happened, in order."""
    if not events:
        return '<p class="none">No events in the log.</p>'
    rows = [
        [number_text(event.step), duration(event.seconds), event.what.replace("_", " "), _facts(event.facts)]
        for event in events[-MOST_EVENTS:]
    ]
    more = len(events) - len(rows)
    told = f'<p class="none">{more} earlier ones are in the log.</p>' if more else ""
    table = html_table(["step", "after", "event", ""], rows)
    return told + (table if len(rows) <= MANY else _folded(f"{len(rows)} events", table))


def files_html(run: RunFiles) -> str:
    """The saved files and their sizes."""
    if not run.saved:
        return '<p class="none">No saved file yet.</p>'
    rows = []
    for path in run.saved:
        facts = path.stat()
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.st_mtime))
        rows.append([path.name, f"{facts.st_size / MB:.1f} MB", written])
    return html_table(["file", "size", "written"], rows)


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


# Parts


def _tiles(run: RunFiles) -> Iterator[Tile]:
    log, total = run.log, run.steps
    yield Tile("state", state_of(run), f"log of {duration(log.seconds)}" if log.seconds else "")
    yield Tile("steps", f"{log.last_step:,}", f"of {total:,}" if total is not None else "")
    loss = _last(log, "loss/average")
    if loss is not None:
        first = next((point.value for point in log.figures["loss/average"] if math.isfinite(point.value)), loss)
        yield Tile("mean loss", number_text(loss), f"began at {number_text(first)}")
    held = [key for key in log.figures if key.startswith("loss/validation/") and key.count("/") == 2]
    if held and (value := _last(log, held[0])) is not None:
        yield Tile("validation loss", number_text(value), "")
    speeds = [point.value for point in log.figures.get("speed/images_per_second", ()) if math.isfinite(point.value)]
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        yield Tile("images a second", number_text(middle), "median step")
    for key, title in (("memory/device_peak", "GPU memory"), ("memory/process_peak", "main memory")):
        if (peak := _last(log, key)) is not None:
            yield Tile(title, f"{number_text(peak)} GiB", "peak")
            break
    yield Tile("files", str(len(run.saved)), f"{sum(path.stat().st_size for path in run.saved) / MB:.1f} MB")


def _last(log: Log, key: str) -> float | None:
    return next((point.value for point in reversed(log.figures.get(key, [])) if math.isfinite(point.value)), None)


def _pairs(table: Mapping[str, Any], what: str) -> str:
    return html_table([what, "value"], ([name, _value(value)] for name, value in table.items() if value is not None))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "(none)"
    return str(value) if value != "" else "(empty)"


def _facts(facts: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} {_value(value)}" for name, value in facts.items())


def _size(size: int | None, images: int | None) -> str:
    if images is not None:
        return f"{images} images"
    return "" if size is None else f"{size:,} bytes"


def _folded(title: str, content: str | Iterable[str]) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
