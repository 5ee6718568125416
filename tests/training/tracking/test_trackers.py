"""TensorBoard and Weights & Biases: what they are started with, and that they never cost a run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.core.rules import without_effect
from library.training.tracking import trackers
from library.training.tracking.options import LogOptions
from library.training.tracking.trackers import MOST_FAILURES, finish_trackers, send, start_trackers, tracker_arguments

KEY = "0123456789abcdef0123456789abcdef01234567"


class Broken:
    """A tracker that fails at some steps."""

    name = "broken"

    def __init__(self, *bad: int) -> None:
        self.bad, self.taken = bad, []

    def log(self, figures: dict, step: int) -> None:
        if step in self.bad:
            raise ConnectionError("no route to host")
        self.taken.append(step)

    def finish(self) -> None:
        raise ConnectionError("still no route to host")


def engine(*found: Any) -> Accelerator:
    return cast(Accelerator, SimpleNamespace(trackers=list(found)))


def real_engine(options: LogOptions) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, log_with=list(options.trackers), project_dir=options.project_dir())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(trackers.logger.parent, "propagate", True)
    caplog.set_level("INFO", "hadron")
    return caplog


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ()),
        ({"logging_dir": "logs"}, ("tensorboard",)),
        ({"log_with": "wandb"}, ("wandb",)),
        ({"log_with": "all", "logging_dir": "logs"}, ("tensorboard", "wandb")),
    ],
)
def test_the_trackers_are_those_that_the_options_name(given: dict, expected: tuple[str, ...]) -> None:
    assert LogOptions(**given).trackers == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"log_with": "tensorboard"}, "--log_with tensorboard: needs --logging_dir"),
        ({"log_with": "all"}, "--log_with all: needs --logging_dir"),
        ({"log_with": "wandb", "log_prefix": "x"}, "--log_prefix has no effect without --logging_dir"),
        ({"log_tracker_name": "x"}, "--log_tracker_name has no effect without a tracker"),
        ({"log_config": True}, "--log_config has no effect without a tracker"),
        ({"log_norms_every_n_steps": -1}, "--log_norms_every_n_steps -1: must not be negative"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(given: dict, problem: str) -> None:
    assert [found[: len(problem)] for found in LogOptions(**given).check()] == [problem]


def test_a_tracker_whose_package_is_absent_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list(LogOptions(log_with="wandb").check()) == ["--log_with wandb: the package wandb is not installed; pip install wandb"]


def test_names_for_a_tracker_that_is_not_used_are_said() -> None:
    options = parse_command_line([LogOptions], ["--logging_dir", "x", "--wandb_run_name", "a", "--wandb_api_key", KEY], prog="x", about="x")
    said = list(without_effect(options, LogOptions.RULES))
    assert [sentence.split()[0] for sentence in said] == ["--wandb_run_name", "--wandb_api_key"] and KEY not in "".join(said)


def test_arguments_come_from_the_file_and_the_command_line_wins(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    path = tmp_path / "trackers.toml"
    path.write_text('[wandb]\nname = "file"\ntags = ["a", "b"]\nsettings = { quiet = true }\n[tensorboard]\nflush_secs = 7\n')
    options = LogOptions(
        log_with="all", logging_dir="logs", log_tracker_config=str(path), wandb_run_name="line", wandb_api_key=KEY
    )  # fmt: skip
    found = tracker_arguments(options)
    assert found["tensorboard"] == {"flush_secs": 7}
    assert found["wandb"] == {
        "name": "line", "tags": ["a", "b"], "dir": "logs", "settings": {"quiet": True, "x_disable_meta": True, "api_key": KEY},
    }  # fmt: skip


def test_tables_and_arguments_that_nobody_knows_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text("[tensorbord]\nx = 1\n[tensorboard]\nflush_sec = 7\nlog_dir = 'elsewhere'\n")
    with pytest.raises(OptionError) as caught:
        tracker_arguments(LogOptions(logging_dir="logs", log_tracker_config=str(path)))
    assert len(caught.value.problems) == 3
    assert "'tensorboard'" in caught.value.problems[0] and "'flush_secs'" in caught.value.problems[1]


def test_a_tracker_that_fails_is_said_once_and_tried_again(said: pytest.LogCaptureFixture) -> None:
    broken, whole = Broken(2, 3), Broken()
    both = engine(broken, whole)
    for step in range(1, 6):
        send(both, {"loss/current": 1.0}, step)
    assert broken.taken == [1, 4, 5] and whole.taken == [1, 2, 3, 4, 5]
    assert [record.message for record in said.records] == [
        "broken did not take the figures of step 2, the run goes on: ConnectionError: no route to host"
    ]


def test_a_tracker_that_never_works_is_left_and_the_others_go_on(said: pytest.LogCaptureFixture) -> None:
    broken, whole = Broken(*range(100)), Broken()
    both = engine(broken, whole)
    for step in range(20):
        send(both, {}, step)
    assert both.trackers == [whole] and len(whole.taken) == 20
    assert f"failed {MOST_FAILURES} times in a row" in said.records[-1].message


def test_a_tracker_that_cannot_finish_is_said_and_the_others_do(said: pytest.LogCaptureFixture) -> None:
    ended = []
    both = engine(Broken(), SimpleNamespace(name="whole", finish=lambda: ended.append(1)))
    finish_trackers(both)
    assert ended == [1] and both.trackers == []
    assert "broken could not be finished" in said.text


def test_a_tracker_that_cannot_start_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = LogOptions(logging_dir=str(tmp_path))
    accelerator = real_engine(options)
    monkeypatch.setattr(accelerator, "init_trackers", lambda *given: (_ for _ in ()).throw(PermissionError("read-only")))
    with pytest.raises(ValueError, match="--log_with: tensorboard could not be started: PermissionError: read-only"):
        start_trackers(accelerator, options, {})


def test_tensorboard_gets_the_figures_and_the_options(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = LogOptions(logging_dir=str(tmp_path), log_prefix="p-", log_config=True)
    accelerator = real_engine(options)
    start_trackers(accelerator, options, {"network_dim": 4, "network_args": ("a=1",)})
    send(accelerator, {"loss/current": 0.5}, 3)
    finish_trackers(accelerator)
    (folder,) = tmp_path.glob("p-*/network_train")
    reader = EventAccumulator(str(folder))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss/current")] == [(3, 0.5)]
    (kept,) = folder.glob("*/hparams.yml")
    assert "network_dim: 4" in kept.read_text()


@pytest.mark.slow
def test_wandb_offline_keeps_the_run_in_a_folder_and_the_key_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["train.py", "--wandb_api_key", KEY])
    options = LogOptions(log_with="all", logging_dir=str(tmp_path), wandb_run_name="named", wandb_api_key=KEY, log_config=True)
    accelerator = real_engine(options)
    start_trackers(accelerator, options, {"network_dim": 4})
    for step in (1, 2):
        send(accelerator, {"loss/current": 0.5}, step)
    finish_trackers(accelerator)
    wandb.teardown()  # its process still writes and removes files
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (kept,) = run.glob("*.wandb")
    content = kept.read_bytes()
    assert b"loss/current" in content and b"network_dim" in content and b"named" in content
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 2 and not [path for path in files if KEY.encode() in path.read_bytes()]
