"""States of sd-scripts go on; what does not fit, or is more than tensors and numbers, is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_family import SmallFamily
from stopped_run import StoppedRun, begun, same

from library.training.optimizing.averaging import stepped

LENGTH = ("--max_train_steps", "8", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2")


def written(stopped: StoppedRun, folder: Path, **place: int) -> Path:
    """The state of a run as sd-scripts has accelerate write it."""
    folder.mkdir(parents=True)
    run = stopped.run
    run.trained.network.save_weights(folder / "model.safetensors", torch.float32, {})
    torch.save(stepped(run.optimizer).state_dict(), folder / "optimizer.bin")
    torch.save(run.schedule.state_dict(), folder / "scheduler.bin")
    torch.save({"step": 0, "random_state": (3, (1, 2), None)}, folder / "random_states_0.pkl")
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": run.epoch, "current_step": run.step + 1} | place))
    return folder


@pytest.fixture
def stopped(sdxl: SmallFamily, images: Path, tmp_path: Path) -> StoppedRun:
    return begun(sdxl, images, tmp_path / "first", *LENGTH).go_on(until=3)


def test_a_state_of_sd_scripts_goes_on_at_its_step(
    stopped: StoppedRun, sdxl: SmallFamily, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(stopped, tmp_path / "net-000001-state")
    taken_up = begun(sdxl, images, tmp_path / "second", *LENGTH, "--resume", str(folder))
    assert (taken_up.run.step, taken_up.run.taken) == (3, stopped.run.taken)
    assert "cannot be taken over" in caplog.text
    assert same(stopped.weights(), taken_up.weights())
    assert same(stopped.go_on().weights(), taken_up.go_on().weights())  # weights, moments and rates are all there


def test_the_schedule_is_believed_where_the_step_began_anew(
    stopped: StoppedRun, sdxl: SmallFamily, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(stopped, tmp_path / "state", current_step=1)
    assert begun(sdxl, images, tmp_path / "second", *LENGTH, "--resume", str(folder)).run.step == 3
    assert "says step 1, and the schedule has made 3" in caplog.text


def test_a_pickle_that_would_run_code_is_refused_and_not_run(stopped: StoppedRun, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = written(stopped, tmp_path / "state")
    torch.save({"state": Trap(), "param_groups": []}, folder / "optimizer.bin")
    with pytest.raises(ValueError, match=r"optimizer.bin: cannot be read as tensors and numbers alone"):
        begun(sdxl, images, tmp_path / "second", *LENGTH, "--resume", str(folder))
    assert not (tmp_path / "sprung").exists()


def test_an_optimizer_of_other_weights_is_refused(stopped: StoppedRun, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    folder = written(stopped, tmp_path / "state")
    state = stepped(stopped.run.optimizer).state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(1, 1)
    torch.save(state, folder / "optimizer.bin")
    with pytest.raises(ValueError, match=r"optimizer.bin: exp_avg of weight 0 is \[1, 1\]"):
        begun(sdxl, images, tmp_path / "second", *LENGTH, "--resume", str(folder))


def test_the_weights_of_another_network_are_refused_by_name(stopped: StoppedRun, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    folder = written(stopped, tmp_path / "state")
    with pytest.raises(ValueError, match=r"model.safetensors: .*(rank|shape|\[)"):
        begun(sdxl, images, tmp_path / "second", *LENGTH, "--resume", str(folder), "--network_dim", "3")


def test_network_weights_that_do_not_fit_are_refused_by_name(stopped: StoppedRun, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    stopped.run.trained.network.save_weights(file, torch.float32, {})
    with pytest.raises(ValueError, match=r"other.safetensors: it adapts lora_te1_\S+, .*which the network does not"):
        begun(sdxl, images, tmp_path / "second", *LENGTH, "--network_weights", str(file), "--network_train_unet_only")
