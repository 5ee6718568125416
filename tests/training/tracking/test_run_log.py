"""The log of a run: whole lines, one log a run, and no run lost for it."""

import errno
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from library.training.tracking import run_log
from library.training.tracking.run_log import RunLog


def lines(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="ascii").splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder) if "event" not in line]


def written(folder: Path, *numbers: int) -> RunLog:
    log = RunLog.open(folder, is_main=True)
    for number in numbers:
        log.record(number, 1, {"loss/current": number / 10})
    return log


def test_a_line_has_the_step_the_epoch_the_seconds_and_the_figures(tmp_path: Path) -> None:
    RunLog.open(tmp_path / "net-run", is_main=True).record(3, 2, {"loss/current": 0.5, "lr/unet": 1e-4})
    begun, line = lines(tmp_path / "net-run")
    assert begun["event"] == "begun"
    assert {key: value for key, value in line.items() if key != "seconds"} == {"step": 3, "epoch": 2, "loss/current": 0.5, "lr/unet": 1e-4}
    assert line["seconds"] >= 0


def test_every_line_is_on_its_way_before_the_next_is_made(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    assert steps(tmp_path) == [1]  # read while the log is open, as after a kill
    log.record(2, 1, {"loss/current": 0.0})
    assert steps(tmp_path) == [1, 2]


def test_numbers_that_are_not_finite_are_texts(tmp_path: Path) -> None:
    RunLog.open(tmp_path, is_main=True).record(1, 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    assert [lines(tmp_path)[1][name] for name in "abcd"] == ["nan", "inf", "-inf", 1.0]


def test_an_event_keeps_its_facts(tmp_path: Path) -> None:
    RunLog.open(tmp_path, is_main=True).event("previews", 4, 1, files=["sample/a.png"], losses=[math.nan])
    assert lines(tmp_path)[1]["event"] == "previews" and lines(tmp_path)[1]["files"] == ["sample/a.png"]
    assert lines(tmp_path)[1]["losses"] == ["nan"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run", is_main=False)
    log.record(1, 1, {"a": 1.0})
    log.event("saved", 1, 1)
    log.rewind(1)
    log.close()
    assert log.mark() == 0 and not (tmp_path / "run").exists()


def test_a_new_run_keeps_the_logs_of_earlier_ones(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        written(tmp_path, number).close()
    assert steps(tmp_path) == [3]
    assert lines(tmp_path, "log-1.jsonl")[1]["step"] == 1 and lines(tmp_path, "log-2.jsonl")[1]["step"] == 2


def test_a_log_that_nothing_is_written_to_leaves_the_old_one(tmp_path: Path) -> None:
    written(tmp_path, 1).close()
    RunLog.open(tmp_path, is_main=True).close()
    assert steps(tmp_path) == [1] and not (tmp_path / "log-1.jsonl").exists()


def test_rewound_to_a_mark_the_log_is_what_it_was(tmp_path: Path) -> None:
    log = written(tmp_path, 1, 2)
    length, content = log.mark(), (tmp_path / "log.jsonl").read_bytes()
    log.record(2, 1, {"loss/validation/step_average": 1.0})
    log.record(3, 1, {"loss/current": 1.0})
    again = RunLog.open(tmp_path, is_main=True)
    again.rewind(2, length)
    assert (tmp_path / "log.jsonl").read_bytes() == content and again.mark() == length
    again.record(3, 1, {"loss/current": 2.0})
    assert steps(tmp_path) == [1, 2, 3] and not (tmp_path / "log-1.jsonl").exists()


@pytest.mark.parametrize("length", [None, 10_000, 7], ids=["none", "beyond the end", "within a line"])
def test_without_a_mark_that_fits_lines_of_later_steps_go(length: int | None, tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 4).close()
    RunLog.open(tmp_path, is_main=True).rewind(2, length)
    assert steps(tmp_path) == [1, 2]


def test_a_line_that_was_cut_off_goes(tmp_path: Path) -> None:
    written(tmp_path, 1, 2).close()
    content = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(content[:-9])
    again = RunLog.open(tmp_path, is_main=True)
    again.rewind(2)
    again.record(2, 1, {"loss/current": 0.3})
    assert steps(tmp_path) == [1, 2]


def test_resuming_without_a_log_begins_one(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path, is_main=True)
    log.rewind(5, 100)
    log.record(6, 1, {"loss/current": 1.0})
    assert steps(tmp_path) == [6]


def test_seconds_go_on_where_the_earlier_session_stopped(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    log._before = 1000.0
    log.record(2, 1, {"a": 1.0})
    again = RunLog.open(tmp_path, is_main=True)
    again.rewind(2)
    again.record(3, 1, {"a": 1.0})
    assert lines(tmp_path)[-1]["seconds"] >= 1000


def test_a_full_disk_costs_lines_and_leaves_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half(file: BinaryIO, line: bytes) -> None:
        file.write(line[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    log = written(tmp_path, 1)
    caplog.set_level("WARNING", "hadron")
    monkeypatch.setattr(run_log.logger.parent, "propagate", True)
    with monkeypatch.context() as full:
        full.setattr(run_log, "_write_whole", half)
        log.record(2, 1, {"a": 1.0})
        log.record(3, 1, {"a": 1.0})
    assert steps(tmp_path) == [1]
    log.record(4, 1, {"a": 1.0})
    assert steps(tmp_path) == [1, 4] and lines(tmp_path)[-1]["event"] == "log_lines_lost" and lines(tmp_path)[-1]["lines"] == 2
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "No space left on device" in said[0] and "2 lines are missing" in said[1]


def test_a_folder_that_cannot_be_made_costs_the_log_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = RunLog.open(tmp_path / "file", is_main=True)
    log.record(1, 1, {"a": 1.0})
    log.close()
    assert log.mark() == 0
