"""Which figures of a run go on which chart, in which order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tools.run_report.charts import Chart, Line, chart_html
from tools.run_report.reading import Log, Point

COLOURS = 6
MARKED = {"left_out": "step left out", "stopped": "stopped", "resumed": "resumed", "warning": "warning", "log_lines_lost": "log lines lost"}
"""Events that the charts of the loss mark, and their names."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart of all figures whose keys begin alike."""

    start: str
    title: str
    unit: str = ""
    may_be_log: bool = False
    starts_at_zero: bool = False
    is_ordered: bool = False  # the lines are parts of a whole, in order
    whole: str = "all"  # the line of the key that is the start alone


PANELS = (
    Panel(start="loss/band/", title="Loss by timestep", unit="0 is the picture, 1000 the noise", may_be_log=True, is_ordered=True),
    Panel(start="lr/", title="Learning rates", may_be_log=True, starts_at_zero=True),
    Panel(start="norm/gradient", title="Norms of gradients", unit="before clipping, by kind of layer", may_be_log=True),
    Panel(start="norm/weight", title="Norms of trained weights", unit="by kind of layer", may_be_log=True),
    Panel(start="max_norm/", title="Bounded norms", unit="--scale_weight_norms", may_be_log=True),
    Panel(start="speed/images_per_second", title="Speed", unit="images a second", starts_at_zero=True, whole="each step"),
    Panel(start="speed/", title="Time of a step", unit="seconds", starts_at_zero=True),
    Panel(start="memory/", title="Memory", unit="GiB", starts_at_zero=True),
)
LOSS, AVERAGE, OF_EPOCHS, VALIDATION = "loss/current", "loss/average", "loss/epoch_average", "loss/validation/"
NO_CURVES = ("speed/images_seen", "step/left_out")  # a straight line, and an event


def charts_html(log: Log) -> str:
    """All charts of a log; a sentence where it has no figures."""
    charts = list(charts_of(log))
    if not charts:
        return '<p class="none">No figures yet: the log has no line of a step.</p>'
    return f'<div class="charts">{"".join(map(chart_html, charts))}</div>'


def charts_of(log: Log) -> Iterator[Chart]:
    """A chart for each group of figures that the log has; what no panel knows comes last, by the start of its key."""
    figures = {key: points for key, points in log.figures.items() if key not in NO_CURVES}
    marks = [(event.step, f"{MARKED[event.what]} at step {event.step}") for event in log.events if event.what in MARKED]
    yield from _losses(figures, marks)
    left = {key: points for key, points in figures.items() if key not in (LOSS, AVERAGE, OF_EPOCHS) and not key.startswith(VALIDATION)}
    for panel in PANELS:
        own = {key: points for key, points in left.items() if key.startswith(panel.start)}
        left = {key: points for key, points in left.items() if key not in own}
        if own:
            yield _panel_chart(panel, own)
    for start in dict.fromkeys(key.partition("/")[0] for key in left):
        own = {key: points for key, points in left.items() if key.partition("/")[0] == start}
        yield _panel_chart(Panel(start=f"{start}/", title=start.replace("_", " ").capitalize(), may_be_log=True), own)


def _losses(figures: Mapping[str, list[Point]], marks: Sequence[tuple[int, str]]) -> Iterator[Chart]:
    own = (
        (LOSS, Line(name="each step", points=figures.get(LOSS, ()), is_faint=True)),
        (AVERAGE, Line(name="average of an epoch's length", points=figures.get(AVERAGE, ()))),
        (OF_EPOCHS, Line(name="at the end of epochs", points=figures.get(OF_EPOCHS, ()), style="c2", has_dots=True)),
    )
    lines = [line for key, line in own if key in figures]
    if lines:
        yield Chart(title="Loss", lines=lines, marks=marks)
    held = {key.removeprefix(VALIDATION): points for key, points in figures.items() if key.startswith(VALIDATION)}
    whole = {key: points for key, points in held.items() if "/" not in key}
    if whole:
        lines = [
            Line(name=_plain(key), points=points, style=_style(n), has_dots=len(points) < 60)
            for n, (key, points) in enumerate(whole.items())
        ]
        yield Chart(title="Validation loss", lines=lines, unit="images held out, fixed noise")
    for start in dict.fromkeys(key.rpartition("/")[0] for key in held if "/" in key):
        bands = {key.rpartition("/")[2]: points for key, points in held.items() if key.startswith(f"{start}/")}
        yield Chart(title="Validation loss by timestep", unit=_plain(start), lines=_ordered(bands), may_be_log=True)


def _panel_chart(panel: Panel, figures: Mapping[str, list[Point]]) -> Chart:
    named = {key.removeprefix(panel.start).strip("/") or panel.whole: points for key, points in figures.items()}
    if panel.is_ordered:
        lines = _ordered(named)
    else:
        lines = [Line(name=_plain(name), points=points, style=_style(n)) for n, (name, points) in enumerate(named.items())]
    return Chart(title=panel.title, unit=panel.unit, lines=lines, may_be_log=panel.may_be_log, starts_at_zero=panel.starts_at_zero)


def _ordered(named: Mapping[str, list[Point]]) -> list[Line]:
    """Lines of bands such as `250-500`, in the order of their lower ends."""
    names = sorted(named, key=lambda name: (len(name.partition("-")[0]), name))
    return [Line(name=name, points=named[name], style=f"o{1 + n % 4}") for n, name in enumerate(names)]


def _style(number: int) -> str:
    """Of the lines of a chart by number: once the colours are used up they come again, dashed."""
    return f"c{1 + number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _plain(key: str) -> str:
    return key.replace("_", " ")
