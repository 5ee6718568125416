"""Results of a benchmark: rows of one way in one setting each, the ratios between them, and the files and tables made of them."""

import argparse
import importlib.metadata
import json
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
FROZEN = "frozen"  # the way of the layer or model alone
PACKAGES = ("torch", "triton", "diffusers", "transformers", "lycoris-lora", "peft")


def results_file(text: str) -> Path:
    """A file of results that an option names. Raises `ArgumentTypeError` where there is none."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}; benchmarks/results/ has those that are kept")
    return path


def pattern(text: str) -> re.Pattern[str]:
    """A regex that an option gives. Raises `ArgumentTypeError` saying what is wrong with it."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regex: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way cost in one setting on one case (a layer, or a model). The frozen case is a row with neither.

    `seconds` has one entry a turn; the rows of a case share their turns. Bytes and counts are those of one forward and backward.
    """

    case: str
    precision: str
    setting: str = ""
    way: str = FROZEN
    positions: int
    seconds: list[float] = field(default_factory=list)
    kept_bytes: int = 0
    peak_bytes: int = 0
    kernels: int = 0
    host_exchanges: int = 0
    path: str = ""  # the way to the delta that ours took
    is_emulated: bool = False  # in half precision on a CPU without instructions for it: times and kernels say nothing of others
    facts: dict[str, float] = field(default_factory=dict)  # what only some cases have: errors, losses


class Rows:
    """The rows of one benchmark, found by case, precision, setting and way."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = {(row.case, row.precision, row.setting, row.way): row for row in rows}

    def __iter__(self) -> Any:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, case: str, precision: str, setting: str, way: str) -> Row | None:
        """The row, if it was measured."""
        return self._rows.get((case, precision, setting, way))

    def beside(self, row: Row, setting: str, way: str) -> Row | None:
        """The row of the same case and precision in another setting or way."""
        return self.find(row.case, row.precision, setting, way)

    def cases(self) -> list[tuple[str, str]]:
        """Case and precision of all rows, each once."""
        return list(dict.fromkeys((row.case, row.precision) for row in self))


def ratio(row: Row, other: Row) -> float:
    """The median over the turns of one's time over the other's."""
    return statistics.median(a / b for a, b in zip(row.seconds, other.seconds, strict=True))


def rounded(value: float, digits: int = 4) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")


# Files


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: processor or GPU, threads, versions of packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    return {
        "device": device,
        "processor": processor,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | versions


def write(path: Path, facts: dict[str, Any], rows: Rows) -> None:
    """Write facts and rows, one row a line."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "facts": {json.dumps(facts)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], Rows]:
    """Facts and rows of a file that `write` made."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["facts"], Rows(Row(**row) for row in content["rows"])


# Tables


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def way_table(rows: Rows, precision: str, ways: Sequence[str], cell: Callable[[Row, Row], str]) -> str:
    """One line for each case and setting, one column for each way; `cell` is told the row and that of the frozen case."""
    body = []
    for case, settings in _settings(rows, precision).items():
        base = rows.find(case, precision, "", FROZEN)
        assert base is not None
        for setting in settings:
            found = [rows.find(case, precision, setting, way) for way in ways]
            body.append([case, setting, *("" if row is None else cell(row, base) for row in found)])
    return markdown(["case", "setting", *ways], body)


def progress_table(rows: Rows, before: Rows, ours: str) -> str:
    """Our time over the frozen case's in an earlier run and in this one, for what both have."""
    body = []
    for row in rows:
        pairs = [(row, rows), (before.find(row.case, row.precision, row.setting, row.way), before)]
        found = [(one, run.beside(one, "", FROZEN)) for one, run in pairs if one is not None and one.seconds]
        if row.way == ours and len(found) == len(pairs):
            now, then = (f"{ratio(one, frozen):.2f}" for one, frozen in found if frozen is not None)
            body.append([row.case, row.precision, row.setting, then, now])
    return markdown(["case", "precision", "setting", "before", "now"], body)


def _settings(rows: Rows, precision: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.precision == precision and row.setting:
            settings = found.setdefault(row.case, [])
            settings += [] if row.setting in settings else [row.setting]
    return found
