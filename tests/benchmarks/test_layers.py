"""The benchmark of layers from its command line: every way has its row, and the file reads back."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import layers, step
from benchmarks.layers import Survey, layer_rows, report, run, small_delta_rows
from benchmarks.peers import OURS, PACKAGES, SD_SCRIPTS, WAYS, Setting
from benchmarks.results import FROZEN, Row, Rows, read
from benchmarks.shapes import ALL, CORE, GRIDS, PRECISIONS, SHAPES, Grid, Shape

LOHA, LOKR = Setting(algorithm="loha", rank=2), Setting(algorithm="lokr", rank=2, factor=4)
TINY = Grid(shapes=(Shape(out=32, inner=48, tokens=8),), settings=(LOHA,), beside=(LOKR,), small=(), seconds=0)


def survey(**asked: object) -> Survey:
    ways = {name: WAYS[name] for name in (OURS, SD_SCRIPTS)}
    return Survey(grid=TINY, ways=ways, **asked)  # pyright: ignore[reportArgumentType]


def test_every_setting_and_way_has_a_row_with_its_turns() -> None:
    rows = list(layer_rows(survey(), TINY.shapes[0], PRECISIONS["float32"]))
    assert [(row.setting, row.way) for row in rows] == [
        ("", FROZEN),
        *((setting.title, way) for setting in (LOHA, LOKR) for way in (OURS, SD_SCRIPTS)),
    ]
    assert {len(row.seconds) for row in rows} == {3}
    assert all(row.kernels > rows[0].kernels for row in rows[1:])


def test_ours_says_which_path_it_took_and_how_exact_each_is() -> None:
    ours = next(row for row in layer_rows(survey(), TINY.shapes[0], PRECISIONS["float32"]) if row.way == OURS)
    assert ours.path
    assert {"output error", "output error, factored", "output error, materialise"} <= ours.facts.keys()
    assert max(ours.facts.values()) < 1e-5


@pytest.mark.parametrize("main", [layers.main, step.main])
def test_a_gpu_that_is_not_there_is_said(
    main: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err


def test_a_filter_that_finds_nothing_leaves_earlier_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        layers.main(["--quick", "--filter", "1280 x 1280.*LoKr", "--output", str(tmp_path / "layers.json")])
    assert "finds nothing in the quick grid" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_filter_leaves_out_shapes_and_settings() -> None:
    assert not list(layer_rows(survey(wanted=re.compile("conv")), TINY.shapes[0], PRECISIONS["float32"]))
    rows = list(layer_rows(survey(wanted=re.compile("32 x 48.*LoKr")), TINY.shapes[0], PRECISIONS["float32"]))
    assert {row.setting for row in rows} == {"", LOKR.title}


def test_the_file_reads_back_and_its_report_has_every_case(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = run(survey(), [PRECISIONS["float32"]], tmp_path / "layers.json")
    facts, again = read(tmp_path / "layers.json")
    assert facts["device"] == "cpu"
    assert list(again) == list(rows)
    assert report(again).count(TINY.shapes[0].title) >= 10


def test_rows_of_small_deltas_have_shares_and_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {OURS: {"seen 0.0001": 1.0}}
    monkeypatch.setattr("benchmarks.layers.seen_shares", lambda *args: shares)
    grid = Grid(shapes=(), settings=(), small=(LOHA,), seconds=0)
    (row,) = small_delta_rows(Survey(grid=grid, ways={OURS: WAYS[OURS]}), PRECISIONS["bfloat16"])
    assert isinstance(row, Row)
    assert (row.facts, row.seconds) == (shares[OURS], [])


def test_packages_are_left_out_beside() -> None:
    grid = GRIDS["default"]
    lineup = list(grid.lineup(SHAPES[1], tuple(WAYS)))
    assert {setting for setting, way in lineup if way in PACKAGES} == set(grid.settings)
    assert {setting for setting, way in lineup if way not in PACKAGES} == {*grid.settings, *grid.beside}


def test_large_layers_are_thinned_but_for_the_full_grid() -> None:
    large = next(shape for shape in SHAPES if shape.is_large)
    assert {setting for setting, way in GRIDS["default"].lineup(large, tuple(WAYS)) if way in PACKAGES} == set(CORE)
    assert {setting for setting, way in GRIDS["full"].lineup(large, tuple(WAYS)) if way in PACKAGES} == set(ALL)


def test_half_precision_is_cut_only_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, grid = Shape(out=640, inner=640, tokens=4096), GRIDS["default"]
    for is_native in (True, False):
        monkeypatch.setattr("benchmarks.shapes.computes", lambda dtype, device, answer=is_native: answer)
        assert grid.cut(shape, PRECISIONS["bfloat16"], "cpu").tokens == (4096 if is_native else grid.half_positions)


def test_rows_are_found_by_their_names() -> None:
    row = Row(case="a", precision="float32", setting="LoHa r2", way=OURS, positions=1)
    assert Rows([row]).find("a", "float32", "LoHa r2", OURS) is row
    assert Rows([row]).find("a", "float32", "LoHa r2", SD_SCRIPTS) is None
