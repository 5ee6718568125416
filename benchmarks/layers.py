"""What an adapted layer costs in every way, over the frozen layer: `python -m benchmarks.layers`.

For layers of SDXL and Anima: time of forward and backward, bytes kept for backward, most bytes alive, kernels, and errors against float64.
Ways take turns in one process, one thread. A CPU without bfloat16 instructions runs half precision on few tokens: its times there say
nothing of other machines. `--quick` takes a minute, the default a quarter of an hour, `--grid full` hours on a CPU.
Writes `benchmarks/results/layers.json` and Markdown tables to the screen, with the goals of docs/performance.md.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import goals
from benchmarks.contest import Contestant, Ground, contestant_on, factor_values, frozen_contestant, timings
from benchmarks.measure import Trace
from benchmarks.numerics import errors, exact_delta, seen_shares, without_base
from benchmarks.peers import OURS, Setting, Way, available_ways, ours
from benchmarks.results import (
    FOLDER,
    FROZEN,
    Row,
    Rows,
    machine,
    pattern,
    progress_table,
    ratio,
    read,
    results_file,
    rounded,
    way_table,
    write,
)  # fmt: skip
from benchmarks.shapes import CORE, GRIDS, PRECISIONS, Grid, Precision, Shape, computes
from networks.kernels import cost

SMALL_AT = Shape(out=1280, inner=1280, remark="small deltas")
PATHS: tuple[cost.Path, ...] = ("factored", "materialise")
METRICS = {
    "time over the frozen layer's": lambda row, base: f"{ratio(row, base):.2f} {row.path}".rstrip(),
    "kept for backward beyond the frozen layer's, MB": lambda row, base: f"{(row.kept_bytes - base.kept_bytes) / 1e6:.2f}",
    "most bytes alive, over the frozen layer's": lambda row, base: f"{row.peak_bytes / base.peak_bytes:.2f}",
    "kernels beyond the frozen layer's": lambda row, base: str(row.kernels - base.kernels),
    "error of output / input gradient / factor gradients of the delta alone": lambda row, base: " / ".join(
        f"{row.facts[name]:.1e}" for name in ("output error", "input gradient error", "factor gradient error")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What of a grid is measured: the shapes and settings in whose names a regex finds something, on a device."""

    grid: Grid
    wanted: re.Pattern[str] = field(default_factory=lambda: re.compile(""))
    device: str = "cpu"
    ways: dict[str, Way] = field(default_factory=available_ways)

    def lineup(self, shape: Shape) -> list[tuple[Setting, str]]:
        """Who takes part on a shape, setting by setting."""
        return [(setting, way) for setting, way in self.grid.lineup(shape, tuple(self.ways)) if self.wants(shape, setting)]

    def wants(self, shape: Shape, setting: Setting) -> bool:
        """Whether a setting is measured on a shape."""
        return self.wanted.search(f"{shape.title} {setting.title}") is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is measured."""
        small = (self.wants(SMALL_AT, setting) for setting in self.grid.small)
        return not any(small) and not any(self.lineup(shape) for shape in self.grid.shapes)


def layer_rows(survey: Survey, shape: Shape, precision: Precision) -> Iterator[Row]:
    """The rows of one shape in one precision."""
    lineup = survey.lineup(shape)
    if not lineup:
        return
    shape = survey.grid.cut(shape, precision, survey.device)
    ground = Ground.of(shape, precision, survey.device)
    frozen = frozen_contestant(ground.layer)
    ground.runner(frozen)()  # what libraries allocate once and keep is not the frozen layer's
    taking_part = [Inspected(contestant=frozen, trace=ground.trace(frozen)[0], errors={}), *_inspected(survey, ground, lineup)]
    times = timings(ground, [one.contestant for one in taking_part], survey.grid.seconds)
    for one, seconds in zip(taking_part, times, strict=True):
        yield _row(ground, one, shape, seconds)


def small_delta_rows(survey: Survey, precision: Precision) -> Iterator[Row]:
    """What is left of small deltas, as rows without times."""
    for setting in survey.grid.small:
        if survey.wants(SMALL_AT, setting):
            for way, shares in seen_shares(SMALL_AT, precision, setting, survey.ways, survey.device).items():
                facts = {name: rounded(share, 3) for name, share in shares.items()}
                place = {"case": SMALL_AT.title, "precision": precision.title, "positions": SMALL_AT.positions}
                yield Row(**place, setting=setting.title, way=way, facts=facts)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A contestant with what one step of it does, and the errors of its delta."""

    contestant: Contestant
    trace: Trace
    errors: dict[str, float]


def _inspected(survey: Survey, ground: Ground, lineup: Sequence[tuple[Setting, str]]) -> Iterator[Inspected]:
    """Every way in every setting. It is inspected without a base, where its output is the delta alone; its operations are the same."""
    bare = without_base(ground)
    for setting, group in groupby(lineup, key=itemgetter(0)):
        values = factor_values(ground.layer, setting, ground.precision)
        exact = exact_delta(ground, setting, values)
        for _, name in group:
            alone = contestant_on(bare.layer, setting, name, survey.ways[name], values)
            trace, output = bare.trace(alone)
            found = errors(bare, alone, output, exact) | (_errors_of_paths(bare, setting, values, exact) if name == OURS else {})
            yield Inspected(contestant=contestant_on(ground.layer, setting, name, survey.ways[name], values), trace=trace, errors=found)


def _errors_of_paths(bare: Ground, setting: Setting, values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The errors of our paths to the delta, also of those that were not chosen."""
    found = {}
    for path in PATHS if setting.algorithm != "lora" else ():
        forced = contestant_on(bare.layer, setting, OURS, partial(ours, path=path), values)
        _, output = bare.trace(forced)
        found |= {f"{what}, {path}": error for what, error in errors(bare, forced, output, exact).items()}
    return found


def _row(ground: Ground, inspected: Inspected, shape: Shape, seconds: list[float]) -> Row:
    contestant = inspected.contestant
    return Row(
        case=shape.title,
        precision=ground.precision.title,
        setting=contestant.setting.title if contestant.setting else "",
        way=contestant.way,
        positions=shape.positions,
        seconds=[rounded(value) for value in seconds],
        path=contestant.path,
        is_emulated=not computes(ground.precision.base, ground.device),
        facts={name: rounded(value, 3) for name, value in inspected.errors.items()},
        **asdict(inspected.trace),
    )


def run(survey: Survey, precisions: Sequence[Precision], path: Path) -> Rows:
    """Everything asked for; the file is written after every shape, so that what is interrupted is not lost."""
    facts, found = machine(survey.device), []
    for precision in precisions:
        for shape in survey.grid.shapes:
            found += layer_rows(survey, shape, precision)
            write(path, facts, Rows(found))
            print(f"{precision.title}: {shape.title}: {len(found)} rows", file=sys.stderr, flush=True)
        if precision.base != torch.float32:
            found += small_delta_rows(survey, precision)
            write(path, facts, Rows(found))
    return Rows(found)


def report(rows: Rows) -> str:
    """All tables as Markdown."""
    timed = Rows(row for row in rows if row.seconds)
    ways = [way for way in dict.fromkeys(row.way for row in rows) if way != FROZEN]
    parts = [
        f"**{precision}: {title}**\n\n{way_table(timed, precision, ways, cell)}"
        for precision in dict.fromkeys(row.precision for row in timed)
        for title, cell in METRICS.items()
    ]
    return "\n\n".join([*parts, "**Goals**\n\n" + goals.table(goals.judged(goals.LAYER_GOALS, rows))])


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", choices=GRIDS, default="default", help="what is measured")
    parser.add_argument("--quick", action="store_const", const="quick", dest="grid", help="the same as --grid quick")
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--filter", type=pattern, default="", help="a regex: only where it finds something in '<shape> <setting>'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=FOLDER / "layers.json")
    parser.add_argument("--before", type=results_file, help="results of an earlier run, for a table of what has changed")
    parser.add_argument("--report", type=results_file, help="measure nothing: the tables of these results")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    torch.set_num_threads(1)
    if options.report:
        rows = read(options.report)[1]
    else:
        survey = Survey(grid=GRIDS[options.grid], wanted=options.filter, device=options.device)
        if survey.is_empty:  # before an earlier run's results are written over
            some = survey.grid.shapes[-1]
            parser.error(f"--filter: finds nothing in the {options.grid} grid, whose layers are called like '{some.title} {CORE[0].title}'")
        rows = run(survey, [PRECISIONS[name] for name in options.dtype], options.output)
    print(report(rows))
    if options.before:
        print("\n**Before and now, over the frozen layer's time**\n\n" + progress_table(rows, read(options.before)[1], OURS))


if __name__ == "__main__":
    main(sys.argv[1:])
