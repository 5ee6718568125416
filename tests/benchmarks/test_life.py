"""The benchmark of a network's life: its results read back, and the goals of issue 4 are judged by them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import goals, life
from benchmarks.life import LIFE_GOALS, RESULTS, Figure, read, report

MERGE = Figure("merge", "LoHa r32", [1.0, 9.0, 2.0], "sd-scripts' way", [4.0, 30.0, 10.0])
IMPORT = Figure("import", "LoHa r32", [0.5, 0.1, 0.4])


def test_goals_are_judged_by_the_median_of_the_ratios_and_by_seconds_where_nothing_is_beside() -> None:
    merge, other_merge, loading = goals.judged(LIFE_GOALS, [MERGE, IMPORT])
    assert [verdict.word for verdict in (merge, other_merge, loading)] == ["met", "not measured", "missed"]
    assert [verdict.figures[0].value for verdict in (merge, loading)] == [0.25, 0.4]


def test_each_goal_is_decided_by_what_is_measured() -> None:
    assert all(verdict.figures for verdict in goals.judged(LIFE_GOALS, read(RESULTS)))


def test_results_are_reported_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "life.json"
    path.write_text(json.dumps({"figures": [asdict(MERGE), asdict(IMPORT)]}), encoding="utf-8")
    life.main(["--report", str(path), "--before", str(path)])
    said = capsys.readouterr().out
    assert said.strip() == report([MERGE, IMPORT], {("merge", "LoHa r32"): 2.0, ("import", "LoHa r32"): 0.4})
    assert "| merge | LoHa r32 | 2.000 | 2.000 | sd-scripts' way | 10.000 | 0.25 |" in said
