"""A disk that is full costs states, not the run; only the last state of a run is a must."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_family import SmallFamily
from stopped_run import StoppedRun, begun

from library.training.state.folder import verified
from library.training.state.saving import expected_size, save_state, tell_space

LENGTH = ("--max_train_steps", "5", "--save_state_every_n_steps", "1")


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("library.core.disk_space.shutil.disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, 2**20))


@pytest.fixture
def stopped(sdxl: SmallFamily, images: Path, tmp_path: Path) -> StoppedRun:
    return begun(sdxl, images, tmp_path, *LENGTH).go_on(until=2)


def test_a_full_disk_keeps_the_old_states_and_the_run_goes_on(
    stopped: StoppedRun, fill_disk: Callable[[], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_disk()
    stopped.go_on(until=3)
    assert stopped.run.step == 3 and [verified(path).step for path in sorted(tmp_path.glob("*-state"))] == [1, 2]
    assert "the state of step 3 could not be saved" in caplog.text and "more must be free for it" in caplog.text


@pytest.mark.parametrize("kind", ["end", "interrupted"])
def test_the_last_state_of_a_run_must_be_saved(kind: Any, stopped: StoppedRun, fill_disk: Callable[[], None], tmp_path: Path) -> None:
    fill_disk()
    stopped.run.step += 1
    with pytest.raises(ValueError, match="the state of step 3 could not be saved"):
        save_state(stopped.run, stopped.states, kind)
    assert verified(tmp_path / "net-step00000002-state").step == 2


def test_a_state_that_stands_already_is_not_saved_again_for_an_interruption(
    stopped: StoppedRun, fill_disk: Callable[[], None], tmp_path: Path
) -> None:
    fill_disk()
    place = save_state(stopped.run, stopped.states, "interrupted")
    assert place == tmp_path / "net-step00000002-state"
    assert verified(tmp_path / "net-step00000002-state").kind == "rolling"


def test_a_write_that_fails_is_said_and_the_run_goes_on(
    stopped: StoppedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.core.tensor_stream.write_all", full)
    assert save_state(stopped.run, stopped.states, "step") is None
    assert "could not be written (No space left on device)" in caplog.text and not list(tmp_path.glob(".*"))
    assert verified(tmp_path / "net-step00000002-state").step == 2


def test_an_old_state_that_cannot_be_removed_costs_no_new_one(
    stopped: StoppedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("library.training.state.saving.remove_state", busy)
    stopped.go_on(until=3)
    assert verified(tmp_path / "net-step00000003-state").step == 3
    assert "net-step00000001-state: could not be removed (Permission denied)" in caplog.text
    assert "could not be saved" not in caplog.text


def test_a_disk_without_room_for_a_state_is_told_before_the_first_step(
    stopped: StoppedRun, fill_disk: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    tell_space(stopped.run, stopped.states)
    assert "a state of this run needs" not in caplog.text
    fill_disk()
    tell_space(stopped.run, stopped.states)
    assert "a state of this run needs" in caplog.text


def test_the_size_told_before_is_near_that_of_the_state(stopped: StoppedRun, tmp_path: Path) -> None:
    files = verified(tmp_path / "net-step00000002-state").files
    tensors = sum(facts.size for name, facts in files.items() if name.startswith(("weights", "optimizer")))
    assert 0.5 < expected_size(stopped.run.trained.network, stopped.run.trained.parameters) / tensors < 1.1
