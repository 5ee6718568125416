"""Line charts as inline SVG: readable as they stand; a script adds the numbers under the pointer."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from tools.run_report.reading import Point

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26  # margins around the lines
MOST_POINTS = 400  # of a line; of more, the lowest and highest of neighbours are kept
LOG_RATIO = 30  # between the largest and smallest value, from which a chart may be logarithmic


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    style: str = "c1"  # c1 ... c6 tell apart, o1 ... o4 go in order
    is_faint: bool = False
    has_dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What one chart shows."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    marks: Sequence[tuple[int, str]] = field(default=())  # steps at which something happened, and what
    may_be_log: bool = False
    starts_at_zero: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to places along an axis of `length` that begins at `start`."""

    low: float
    high: float
    start: float
    length: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands."""
        low, high, value = (math.log10(x) for x in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return self.start + self.length * (value - low) / (high - low)


def chart_html(chart: Chart) -> str:
    """A figure with title, legend and lines; what was not finite is a gap that the legend counts."""
    drawn = merged(line for line in chart.lines if any(math.isfinite(point.value) for point in line.points))
    if not drawn:
        return f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b></figcaption><p class="none">no finite value</p></figure>'
    x, y = _scales(chart, drawn)
    shapes = [*_grid(x, y), *_marks(chart.marks, x), *(shape for line in drawn for shape in _line(line, x, y))]
    data = escape(json.dumps(_data(drawn, x, y), separators=(",", ":"), allow_nan=False))
    label = escape(f"{chart.title}: {', '.join(f'{line.name} {number_text(_last(line).value)}' for line in drawn)}")
    about = "; ".join(filter(None, (chart.unit, "logarithmic" if y.is_log else "")))
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b> <small>{escape(about)}</small>'
        f"<div>{''.join(map(_key, drawn))}</div></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" data-chart="{data}">{"".join(shapes)}</svg></figure>'
    )


def merged(lines: Iterable[Line]) -> list[Line]:
    """The lines, those with the very same points as one that has all their names."""
    found: dict[tuple[Point, ...], Line] = {}
    for line in lines:
        points = tuple(line.points)
        same = found.get(points)
        found[points] = line if same is None else replace(same, name=f"{same.name}, {line.name}")
    return list(found.values())


def number_text(value: float) -> str:
    """A number for people: four significant digits, thousands in groups, small ones as powers."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def axis_labels(levels: Sequence[float]) -> list[str]:
    """The numbers of an axis, all written alike: as powers where the largest is small or huge, else with the digits that all need."""
    most = max(map(abs, levels), default=0.0)
    if most < 1e-2 or most >= 1e6:
        return [f"{level:.3g}" if level in (0.0, 1.0) else f"{level:.1e}".replace("e-0", "e-").replace("e+0", "e") for level in levels]
    return [f"{level:,.10g}" for level in levels]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS` points with the same extremes; gaps stay gaps."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return list(points)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = [point for point in points[start : start + size] if math.isfinite(point.value)]
        if not part:
            kept.append(points[start])
            continue
        extremes = {min(part, key=lambda point: point.value), max(part, key=lambda point: point.value)}
        kept += sorted(extremes, key=lambda point: point.step)
    return kept if kept[-1].step == points[-1].step else [*kept, points[-1]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, inclusive."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= most), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


# Parts


def _scales(chart: Chart, lines: Iterable[Line]) -> tuple[Scale, Scale]:
    points = [point for line in lines for point in line.points]
    values = [point.value for point in points if math.isfinite(point.value)]
    first, last = min(point.step for point in points), max(point.step for point in points)
    first = 0 if first <= last / 4 else first  # else a part of the run alone: its log was cut
    low, high = min(values), max(values)
    is_log = chart.may_be_log and low > 0 and high / low >= LOG_RATIO
    if is_log:
        low, high = low / 1.2, high * 1.2
    else:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = 0.0 if chart.starts_at_zero and low >= 0 else low - room, high + room
    return (
        Scale(first, max(last, first + 1), LEFT, WIDTH - LEFT - RIGHT),
        Scale(low, high, HEIGHT - BOTTOM, -(HEIGHT - TOP - BOTTOM), is_log),
    )


def _grid(x: Scale, y: Scale) -> Iterable[str]:
    low, high = math.log10(y.low) if y.is_log else 0, math.log10(y.high) if y.is_log else 0
    levels = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)] if y.is_log else ticks(y.low, y.high)
    for value, label in zip(levels, axis_labels(levels), strict=True):
        place = y.place(value)
        yield f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="y" x="{LEFT - 7}" y="{place + 4:.1f}">{label}</text>'
    yield f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    for value in ticks(x.low, x.high, 6):
        if value == int(value):
            yield f'<text class="x" x="{x.place(value):.1f}" y="{HEIGHT - 8}">{value:,.0f}</text>'


def _marks(marks: Iterable[tuple[int, str]], x: Scale) -> Iterable[str]:
    """A small triangle on the axis for each."""
    for step, what in marks:
        if x.low <= step <= x.high:
            place, foot = x.place(step), HEIGHT - BOTTOM
            shape = f"M{place:.1f} {foot - 7}l4 7h-8z"
            yield f'<path class="mark" d="{shape}"><title>{escape(what)}</title></path>'


def _line(line: Line, x: Scale, y: Scale) -> Iterable[str]:
    """The line as one path with gaps, a dot for each value that stands alone or where the line has dots."""
    kind = f"line {line.style}" + (" faint" if line.is_faint else "")
    path, dots, is_down = [], [], False
    points = thinned(line.points)
    for index, point in enumerate(points):
        if not math.isfinite(point.value):
            is_down = False
            continue
        place = f"{x.place(point.step):.1f} {y.place(point.value):.1f}"
        path.append(f"{'L' if is_down else 'M'}{place}")
        ends = index + 1 == len(points) or not math.isfinite(points[index + 1].value)
        if line.has_dots or (ends and not is_down):
            dots.append(place.split(" "))
        is_down = True
    yield f'<path class="{kind}" d="{"".join(path)}"/>'
    yield from (f'<circle class="dot {line.style}" cx="{across}" cy="{down}" r="3"/>' for across, down in dots)


def _key(line: Line) -> str:
    gaps = sum(not math.isfinite(point.value) for point in line.points)
    missing = f" ({gaps} not finite)" if gaps else ""
    kind = f"{line.style} faint" if line.is_faint else line.style
    return f'<span><i class="key {kind}"></i>{escape(line.name)} <em>{number_text(_last(line).value)}</em>{missing}</span> '


def _last(line: Line) -> Point:
    return next(point for point in reversed(line.points) if math.isfinite(point.value))


def _data(lines: Iterable[Line], x: Scale, y: Scale) -> dict[str, object]:
    """What the script needs: places of the axis, and the points that are drawn."""
    return {
        "x": [x.low, x.high, x.start, x.length],
        "lines": [
            [line.name, line.style, [[point.step, _rounded(point.value)] for point in thinned(line.points) if math.isfinite(point.value)]]
            for line in lines
        ],
        "y": [y.low, y.high, y.start, y.length, y.is_log],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
