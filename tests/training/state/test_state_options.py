"""The options of states: what is refused, what has no effect, and which states are due and kept."""

from pathlib import Path
from typing import Any

import pytest
from small_state import small_manifest
from stopped_run import options_with_states

from library.core.options import OptionError
from library.training.length import Length
from library.training.rules import without_effect
from library.training.save import SaveOptions, Saver
from library.training.state.identity import FIELDS, Mismatch, field_names, mismatches
from library.training.state.options import StateOptions
from library.training.state.states import States, names_of, refuse_mismatches

LENGTH = Length(steps_per_epoch=10, steps=100)


def states_of(folder: Path, saving: dict[str, Any], **options: Any) -> States:
    saver = Saver(SaveOptions(output_dir=str(folder), output_name="net", **saving))
    return States(options=StateOptions(**options), saver=saver, names=names_of(saver), seed=1, identity={})


@pytest.mark.parametrize(("options", "said"), [
    ({"save_state_every_n_steps": 0}, "--save_state_every_n_steps 0: must be at least 1"),
    ({"initial_step": -1}, "--initial_step -1: must not be negative"),
    ({"initial_step": 1, "initial_epoch": 1}, "exclude each other"),
    ({"resume": " "}, "--resume: name the folder of a state, or auto"),
    ({"resume": "x", "allow_resume_mismatch": ("lengt",)}, "unknown field 'lengt'; did you mean 'length'?"),
])  # fmt: skip
def test_what_is_wrong_is_said(options: dict[str, Any], said: str) -> None:
    assert said in "\n".join(StateOptions(**options).check())


@pytest.mark.parametrize("name", [*FIELDS, "images:1.1", "network_dim", "pretrained_model_name_or_path", "qwen3", "mixed_precision"])
def test_every_field_may_be_allowed_to_differ(name: str) -> None:
    assert not list(StateOptions(resume="x", allow_resume_mismatch=(name,)).check())


def test_what_changes_no_file_is_no_field() -> None:
    harmless = {"output_dir", "logging_dir", "save_every_n_steps", "sample_prompts", "max_data_loader_n_workers", "cache_latents_to_disk"}
    assert not harmless & set(field_names())


@pytest.mark.parametrize(("argv", "said"), [
    (("--save_state", "--save_state_on_train_end"), "--save_state_on_train_end has no effect"),
    (("--save_last_n_epochs_state", "2"), "--save_last_n_epochs_state has no effect"),
    (("--save_last_n_steps_state", "2", "--save_state"), "--save_last_n_steps_state has no effect"),
    (("--allow_resume_mismatch", "length"), "--allow_resume_mismatch has no effect"),
    (("--skip_until_initial_step",), "--skip_until_initial_step has no effect"),
])  # fmt: skip
def test_an_option_in_vain_is_said(argv: tuple[str, ...], said: str, sdxl: Any, images: Path, tmp_path: Path) -> None:
    assert said in "\n".join(without_effect(options_with_states(sdxl, images, tmp_path, *argv)))


def test_a_misspelt_field_is_refused_on_the_command_line(sdxl: Any, images: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'learning_rate'"):
        options_with_states(sdxl, images, tmp_path, "--resume", "auto", "--allow_resume_mismatch", "learning_rat")


@pytest.mark.parametrize(("options", "moment", "step", "kind"), [
    ({"save_state": True}, "step", 20, "step"),
    ({"save_state": True}, "step", 21, None),
    ({}, "step", 20, None),
    ({"save_state": True}, "step", 100, "end"),
    ({"save_state_on_train_end": True}, "step", 100, "end"),
    ({"save_state_on_train_end": True}, "step", 20, None),
    ({"save_state_every_n_steps": 7}, "step", 21, "rolling"),
    ({"save_state_every_n_steps": 7, "save_state": True}, "step", 20, "step"),
    ({"save_state": True}, "epoch", 30, "epoch"),
    ({"save_state": True}, "epoch", 100, None),
    ({"save_state_on_train_end": True}, "epoch", 30, None),
])  # fmt: skip
def test_a_state_is_due_where_it_was_asked_for(options: dict[str, Any], moment: Any, step: int, kind: str | None, tmp_path: Path) -> None:
    states = states_of(tmp_path, {"save_every_n_steps": 20, "save_every_n_epochs": 1}, **options)
    assert states.due(moment, step=step, epoch=step // 10, length=LENGTH) == kind


@pytest.mark.parametrize(("saving", "options", "kind", "every", "kept"), [
    ({"save_every_n_steps": 10}, {}, "step", 10, [10, 20, 30, 40, 50]),
    ({"save_every_n_steps": 10, "save_last_n_steps": 20}, {}, "step", 10, [30, 40, 50]),
    ({"save_every_n_steps": 10, "save_last_n_steps": 20}, {"save_last_n_steps_state": 9}, "step", 10, [50]),
    ({}, {}, "rolling", 10, [40, 50]),
    ({}, {"save_last_n_steps_state": 30}, "rolling", 10, [20, 30, 40, 50]),
    ({"save_every_n_epochs": 2, "save_last_n_epochs": 2}, {}, "epoch", 20, [80, 100]),
    ({"save_every_n_epochs": 2, "save_last_n_epochs": 3}, {"save_last_n_epochs_state": 1}, "epoch", 20, [100]),
])  # fmt: skip
def test_the_states_kept_are_those_of_the_options(
    saving: dict[str, Any], options: dict[str, Any], kind: Any, every: int, kept: list[int], tmp_path: Path
) -> None:
    states = states_of(tmp_path, saving, **options)
    manifests = [small_manifest(every * n, kind=kind, epoch=every * n // 10) for n in range(1, 6)]
    there: list[int] = []
    for manifest in manifests:
        there.append(manifest.step)
        known = [(tmp_path / str(step), small_manifest(step, kind=kind, epoch=step // 10)) for step in there]
        gone = {int(path.name) for path in states.outdated(manifest, known, LENGTH)}
        there = [step for step in there if step not in gone]
    assert there == kept


def test_states_of_another_run_are_not_removed(tmp_path: Path) -> None:
    states = states_of(tmp_path, {}, save_state_every_n_steps=1)
    others = [(tmp_path / str(step), small_manifest(step, kind="rolling", session="8")) for step in range(5)]
    assert states.outdated(small_manifest(9, kind="rolling"), others, LENGTH) == []


def test_the_state_of_an_interruption_goes_once_a_newer_one_stands(tmp_path: Path) -> None:
    states = states_of(tmp_path, {})
    known = [(tmp_path / "a", small_manifest(3, kind="interrupted")), (tmp_path / "b", small_manifest(2, kind="step"))]
    assert states.outdated(small_manifest(5, kind="step"), known, LENGTH) == [tmp_path / "a"]


def test_fields_are_compared_one_by_one() -> None:
    found = mismatches({"a": 1, "b": [1], "gone": None, "old": 2}, {"a": 1, "b": [2], "new": 0})
    assert found == [Mismatch("b", [1], [2]), Mismatch("old", 2, None)]


def test_allowing_images_allows_those_of_every_folder(caplog: pytest.LogCaptureFixture) -> None:
    standing: Any = type("Standing", (), {"folder": Path("x")})
    refuse_mismatches(standing, [Mismatch("images:2.1", "3 images, a", "4 images, b")], ["images", "seed"])
    assert "the state has 3 images, a, this run has 4 images, b" in caplog.text
    assert "--allow_resume_mismatch seed has no effect" in caplog.text
