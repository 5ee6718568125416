"""Line charts: places, ticks, thinning."""

import math

import pytest

from tools.run_report.charts import MOST_POINTS, Chart, Line, Scale, axis_labels, chart_html, merged, number_text, thinned, ticks
from tools.run_report.reading import Point


def test_thinning_keeps_the_extremes_the_ends_and_the_order() -> None:
    points = [Point(step, math.sin(step / 9) + (50 if step == 7777 else 0)) for step in range(10_000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 2 and max(few, key=lambda point: point.value).step == 7777
    assert min(point.value for point in few) == min(point.value for point in points)
    assert few[-1] == points[-1] and [point.step for point in few] == sorted(point.step for point in few)


def test_a_long_gap_stays_a_gap_when_thinned() -> None:
    points = [Point(step, math.nan if 4000 <= step < 6000 else 1.0) for step in range(10_000)]
    assert any(math.isnan(point.value) for point in thinned(points))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 20, 40, 60]),
        (0.0, 0.2, [0, 0.05, 0.1, 0.15, 0.2]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1000, 1007, [1000, 1002, 1004, 1006]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_an_axis_writes_its_numbers_alike() -> None:
    assert axis_labels([0.0, 5e-4, 1e-3]) == ["0", "5.0e-4", "1.0e-3"]
    assert axis_labels([0.0, 0.5, 1.0]) == ["0", "0.5", "1"]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (12345.6, "12,346"), (2e-5, "2.00e-5"), (0.123456, "0.1235"), (math.nan, "nan")])
def test_numbers_for_people(value: float, text: str) -> None:
    assert number_text(value) == text


def test_a_logarithmic_axis_places_powers_at_equal_distances() -> None:
    scale = Scale(1e-4, 1.0, 0, 100, is_log=True)
    assert [round(scale.place(10.0**power)) for power in (-4, -2, 0)] == [0, 50, 100]


def test_a_chart_of_one_constant_point_has_an_axis() -> None:
    drawing = chart_html(Chart(title="Memory", lines=[Line(name="device", points=[Point(1, 2.0)])]))
    assert "<circle" in drawing and "nan" not in drawing


def test_a_chart_without_a_finite_value_says_so() -> None:
    assert "no finite value" in chart_html(Chart(title="Loss", lines=[Line(name="each step", points=[Point(1, math.nan)])]))


def test_lines_with_the_same_points_are_one_with_both_names() -> None:
    points = [Point(1, 2.0), Point(2, 1.0)]
    (line, other) = merged([Line(name="unet", points=points), Line(name="text", points=list(points)), Line(name="x", points=points[:1])])
    assert line.name == "unet, text" and other.name == "x"
