"""A run that is taken up again goes on as if it had never been stopped."""

import logging
from pathlib import Path

import numpy
import pytest
import torch
from small_family import SmallFamily
from stopped_run import begun, same

from library.training.state.folder import read_manifest, verified
from networks.base import Adapter

LENGTH = ("--max_train_steps", "7", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2")
EVERY = ("--save_state_every_n_steps", "1")


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bytes(step: int, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    whole = begun(sdxl, images, tmp_path / "whole", *LENGTH).go_on()
    begun(sdxl, images, tmp_path / "cut", *LENGTH, *EVERY).go_on(until=step)
    taken_up = begun(sdxl, images, tmp_path / "cut", *LENGTH, *EVERY, "--resume", "auto")
    assert (taken_up.run.step, taken_up.stands) == (step, "step")
    taken_up.go_on()
    assert same(whole.weights(), taken_up.weights())
    assert whole.run.progress.losses == taken_up.run.progress.losses
    assert whole.run.progress.epoch_figures() == taken_up.run.progress.epoch_figures()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    ("--gradient_accumulation_steps", "2"), ("--optimizer_type", "Prodigy", "--learning_rate", "1"), ("--scale_weight_norms", "0.01"),
    ("--mixed_precision", "bf16", "--full_bf16"), ("--network_train_unet_only", "--network_dropout", "0.3"),
])  # fmt: skip
def test_a_resumed_run_of_any_kind_ends_with_the_same_bytes(
    extra: tuple[str, ...], anima: SmallFamily, images: Path, tmp_path: Path
) -> None:
    whole = begun(anima, images, tmp_path / "whole", *LENGTH, *extra).go_on()
    begun(anima, images, tmp_path / "cut", *LENGTH, *EVERY, *extra).go_on(until=2)
    taken_up = begun(anima, images, tmp_path / "cut", *LENGTH, *EVERY, *extra, "--resume", "auto").go_on()
    assert same(whole.weights(), taken_up.weights())


@pytest.mark.slow
@pytest.mark.parametrize("module", ["networks.loha", "networks.lokr", "lycoris.kohya"])
def test_every_network_ends_with_the_same_bytes(module: str, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    whole = begun(sdxl, images, tmp_path / "whole", *LENGTH, module=module).go_on(until=5)
    begun(sdxl, images, tmp_path / "cut", *LENGTH, *EVERY, module=module).go_on(until=2)
    taken_up = begun(sdxl, images, tmp_path / "cut", *LENGTH, *EVERY, "--resume", "auto", module=module).go_on(until=5)
    assert same(whole.weights(), taken_up.weights())


def test_averaged_weights_and_readings_go_on(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    argv = (*LENGTH, *EVERY, "--ema_decay", "0.9")
    first = begun(sdxl, images, tmp_path, *argv).go_on(until=2)
    second = begun(sdxl, images, tmp_path, *argv, "--resume", "auto")
    one, other = first.run.average, second.run.average
    assert one is not None and other is not None
    one.update()
    other.update()
    assert other.updates == one.updates
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict()["average"], other.state_dict()["average"], strict=True))
    assert first.run.instruments.state_dict() == second.run.instruments.state_dict()


def test_a_state_of_an_epoch_stands_at_its_end(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    argv = (*LENGTH, "--save_state", "--save_every_n_epochs", "1")
    first = begun(sdxl, images, tmp_path, *argv)
    per_epoch = first.run.length.steps_per_epoch
    first.go_on(until=per_epoch + 1)
    taken_up = begun(sdxl, images, tmp_path, *argv, "--resume", str(tmp_path / "net-000001-state"))
    run = taken_up.run
    assert (run.step, run.epoch, taken_up.stands) == (per_epoch, 1, "epoch")
    assert same(first.weights(), taken_up.go_on(until=per_epoch + 1).weights())


def test_a_resumed_run_has_the_generators_of_the_stopped_one(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = begun(sdxl, images, tmp_path, *LENGTH, *EVERY)
    torch.rand(5)
    first.go_on(until=2)
    drawn = torch.rand(3), numpy.random.rand(3)
    begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto")
    assert torch.equal(torch.rand(3), drawn[0]) and (numpy.random.rand(3) == drawn[1]).all()


def test_a_resumed_run_is_the_same_session(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=1)
    second = begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto")
    assert all(first.run.metadata[name] == second.run.metadata[name] for name in ("ss_session_id", "ss_training_started_at"))


def test_a_seed_that_was_drawn_is_drawn_no_second_time(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    first = begun(sdxl, images, tmp_path, *LENGTH, *EVERY, "--seed", "none").go_on(until=1)
    assert begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto", "--seed", "none").states.seed == first.states.seed


def test_auto_begins_anew_where_there_is_no_state(
    sdxl: SmallFamily, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto").run.step == 0
    assert "no state of this output name" in caplog.text


def test_auto_goes_back_to_the_state_before_a_damaged_one(
    sdxl: SmallFamily, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=3)
    damaged = tmp_path / "net-step00000003-state" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto").run.step == 2
    assert f"{damaged}: truncated" in caplog.text


def test_a_damaged_state_that_is_named_is_refused_with_the_newest_whole_one(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=3)
    (tmp_path / "net-step00000003-state" / "optimizer.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"optimizer.safetensors: missing\n.*the newest whole state is .*net-step00000002-state \(step 2\)"
    ):
        begun(sdxl, images, tmp_path, *LENGTH, "--resume", str(tmp_path / "net-step00000003-state"))


def test_a_folder_that_is_not_there_is_refused_with_the_nearest(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=1)
    with pytest.raises(ValueError, match=r"no such folder; did you mean net-step00000001-state\?"):
        begun(sdxl, images, tmp_path, *LENGTH, "--resume", str(tmp_path / "net-step0000001-state"))


def test_the_state_of_another_run_is_refused_by_field_with_both_values(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=1)
    with pytest.raises(ValueError) as refused:
        begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto", "--learning_rate", "0.5", "--max_train_steps", "9")
    text = str(refused.value)
    assert "learning_rate: the state has 0.01, this run has 0.5" in text and "length: the state has 7, this run has 9" in text
    assert "--allow_resume_mismatch length learning_rate" in text


def test_a_longer_run_goes_on_with_its_own_schedule(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=3)
    argv = (*LENGTH, "--max_train_steps", "20")
    longer = begun(sdxl, images, tmp_path, *argv, "--resume", "auto", "--allow_resume_mismatch", "length")
    fresh = begun(sdxl, images, tmp_path / "fresh", *argv).go_on(until=3)
    assert longer.run.schedule.get_last_lr() == fresh.run.schedule.get_last_lr()


def test_a_run_that_ends_before_its_state_is_refused(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=3)
    with pytest.raises(ValueError, match="the state has made 3 steps, and this run ends after 2"):
        begun(sdxl, images, tmp_path, *LENGTH, "--max_train_steps", "2", "--resume", "auto", "--allow_resume_mismatch", "length")


def test_another_alpha_that_is_allowed_is_trained_and_saved(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY, "--network_alpha", "1").go_on(until=1)
    argv = (*LENGTH, "--network_alpha", "2", "--resume", "auto", "--allow_resume_mismatch", "network_alpha")
    network = begun(sdxl, images, tmp_path, *argv).run.trained.network
    assert {(float(module.alpha), module.scale) for module in network.modules() if isinstance(module, Adapter)} == {(2.0, 1.0)}


def test_an_average_that_the_state_lacks_begins_with_its_weights(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=3)
    argv = (*LENGTH, "--resume", "auto", "--ema_decay", "0.9", "--allow_resume_mismatch", "ema_decay")
    taken_up = begun(sdxl, images, tmp_path, *argv)
    own = taken_up.weights()
    assert taken_up.run.average is not None
    with taken_up.run.average.shown():
        assert same(own, taken_up.weights())


def test_an_output_folder_that_is_named_tells_its_newest_state(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=2)
    with pytest.raises(ValueError, match=r"the newest whole state is \S+net-step00000002-state \(step 2\)"):
        begun(sdxl, images, tmp_path / "new", *LENGTH, "--resume", str(tmp_path))


def test_a_state_that_stands_aside_is_kept_where_the_one_in_its_place_is_damaged(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=2)
    place, aside = tmp_path / "kept", tmp_path / ".kept.old"
    for number, folder in ((1, place), (2, aside)):
        (tmp_path / f"net-step{number:08d}-state").rename(folder)
    (place / "content.json").write_text("{}")
    with pytest.raises(ValueError, match=r"content\.json: truncated"):
        begun(sdxl, images, tmp_path / "new", *LENGTH, "--resume", str(place))
    assert verified(aside).step == 2


def test_weights_that_do_not_fit_are_refused_by_name(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=1)
    with pytest.raises(ValueError, match=r"do not fit this network; of another shape \d+: lora_\S+ \[2, \d+\] for \[3, \d+\]"):
        begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto", "--network_dim", "3", "--allow_resume_mismatch", "network_dim")


def test_an_initial_step_leaves_out_data_and_schedule_before_it(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    told = begun(sdxl, images, tmp_path / "told", *LENGTH, "--initial_step", "5")
    trained = begun(sdxl, images, tmp_path / "trained", *LENGTH).go_on(until=5)
    assert (told.run.step, told.run.epoch, told.run.taken) == (5, trained.run.epoch, trained.run.taken)
    assert told.run.schedule.get_last_lr() == trained.run.schedule.get_last_lr()


def test_an_initial_epoch_begins_with_its_first_batch(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    told = begun(sdxl, images, tmp_path, *LENGTH, "--initial_epoch", "2").run
    assert (told.step, told.epoch, told.taken) == (told.length.steps_per_epoch, 2, 0)


def test_an_initial_step_behind_the_end_is_refused(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--initial_step 7: the run has 7 steps"):
        begun(sdxl, images, tmp_path, *LENGTH, "--initial_step", "7")


def test_the_two_newest_rolling_states_are_kept(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, *EVERY).go_on(until=5)
    assert [path.name for path in sorted(tmp_path.glob("*-state"))] == ["net-step00000004-state", "net-step00000005-state"]


def test_an_end_state_says_that_the_run_is_finished(
    sdxl: SmallFamily, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(sdxl, images, tmp_path, *LENGTH, "--save_state_on_train_end").go_on()
    assert read_manifest(tmp_path / "net-state").kind == "end"
    assert begun(sdxl, images, tmp_path, *LENGTH, "--resume", "auto").run.step == 7
    assert "the run of this state is finished" in caplog.text
