"""Goals are judged by the figures of the rows, and not without them."""

from dataclasses import replace

import pytest

from benchmarks.goals import (
    LAYER_GOALS,
    MANY,
    STEP_GOALS,
    Figure,
    Goal,
    Verdict,
    against,
    against_best_package,
    judged,
    kept_over_lora,
    table,
)
from benchmarks.peers import LYCORIS, OURS, PEFT, SD_SCRIPTS
from benchmarks.results import FROZEN, Row, Rows, progress_table, ratio
from benchmarks.shapes import HOST_COST, LOHA_8, LORA_16

LOHA, LORA = LOHA_8.title, LORA_16.title


def row(setting: str, way: str, *seconds: float, **facts: float) -> Row:
    return Row(case="a layer", precision="float32", setting=setting, way=way, positions=MANY, seconds=list(seconds), **facts)  # pyright: ignore[reportArgumentType]


ROWS = Rows(
    [
        row("", FROZEN, 1, 1, 1, kept_bytes=100),
        row(LORA, OURS, 1.2, 2.4, 1.2, kept_bytes=200),
        row(LOHA, OURS, 1.3, 2.6, 1.5, kept_bytes=150),
        row(LOHA, SD_SCRIPTS, 2.6, 5.2, 2.6),
        row(LOHA, LYCORIS, 2.6, 2.6, 1.0),
        row(LOHA, PEFT, 1.0, 2.0, 1.0),
    ]
)


def test_a_ratio_is_the_median_of_the_turns_ratios() -> None:
    assert ratio(row("", "", 1, 30, 2), row("", "", 1, 10, 1)) == 2


def test_progress_is_shown_for_what_both_runs_have() -> None:
    before = Rows([row("", FROZEN, 1), row(LOHA, OURS, 3), row(LOHA, SD_SCRIPTS, 3)])
    lines = progress_table(ROWS, before, OURS).splitlines()[2:]
    assert lines == [f"| a layer | float32 | {LOHA} | 3.00 | 1.50 |"]


def test_our_time_is_compared_within_case_and_precision() -> None:
    (figure,) = against((LOHA,), ("", SD_SCRIPTS))(ROWS)
    assert figure.value == 0.5
    assert figure.where == f"{LOHA}, a layer, float32"
    (figure,) = against((LOHA,), (LORA, OURS))(ROWS)
    assert figure.value == pytest.approx(1.3 / 1.2)


def test_cases_with_few_tokens_are_left_out_where_the_goal_says_so() -> None:
    assert not list(against((LOHA,), (LORA, OURS), positions=MANY + 1)(ROWS))


def test_the_best_package_is_the_one_that_ours_does_worst_against() -> None:
    (figure,) = against_best_package(ROWS)
    assert figure.value == pytest.approx(1.3)


def test_packages_are_compared_on_the_layer_of_the_hosts_cost_too() -> None:
    rows = Rows(replace(row, case=HOST_COST.title) for row in ROWS)
    assert [figure.value for figure in against_best_package(rows)] == [pytest.approx(1.3)]


def test_kept_bytes_are_compared_beyond_the_frozen_layers() -> None:
    (figure,) = kept_over_lora(ROWS)
    assert figure.value == 0.5


def test_an_emulated_dtype_decides_no_goal_of_time() -> None:
    rows = Rows([row(LOHA, OURS, 1, is_emulated=True), row(LOHA, SD_SCRIPTS, 1, is_emulated=True)])
    assert not list(against((LOHA,), ("", SD_SCRIPTS))(rows))


@pytest.mark.parametrize(("values", "word"), [([], "not measured"), ([0.9, 1.0], "met"), ([0.9, 1.2], "missed")])
def test_a_goal_is_met_by_all_figures_or_missed(values: list[float], word: str) -> None:
    goal = Goal(text="", most=1.0, figures=lambda rows: [])
    assert Verdict(goal=goal, figures=[Figure(where="", value=value) for value in values]).word == word


def test_the_worst_figure_is_the_farthest_from_the_middle_of_two_bounds() -> None:
    goal = Goal(text="", least=0.99, most=1.01, figures=lambda rows: [])
    figures = [Figure(where=where, value=value) for where, value in (("low", 0.5), ("high", 1.1))]
    assert Verdict(goal=goal, figures=figures).worst.where == "low"


def test_every_goal_stands_in_the_table_measured_or_not() -> None:
    listed = (*LAYER_GOALS, *STEP_GOALS)
    text = table(judged(listed, Rows()))
    assert text.count("not measured") == len(listed)
    assert all(goal.text in text for goal in listed)
