"""Lock files: what they hold, what they never hold, and that a run is compared with its own."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_family import SmallFamily

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.training.prepare import load_data
from library.training.reproduction import lock as lock_file
from library.training.reproduction import surroundings
from library.training.reproduction.inputs import Input, inputs_of
from library.training.reproduction.lock import Lock, without_secrets, write_lock
from library.training.reproduction.reproduce import ReproduceOptions, input_differences, keep_lock, lock_of, refusals
from library.training.retired import refused_options
from library.training.run import main, option_groups


def options_of(family: SmallFamily, *argv: str) -> OptionSet:
    groups = [*option_groups(family.arch)]
    groups += [] if ReproduceOptions in groups else [ReproduceOptions]
    return parse_command_line(groups, argv, prog="test", about="test", refuse=refused_options(family.arch))


def command(family: SmallFamily, images: Path, output: Path, *extra: str) -> list[str]:
    data = ["--dataset_config", str(images / "dataset.toml"), "--output_dir", str(output), "--output_name", "net"]
    return [*family.files, *data, "--network_module", "networks.lora", "--max_data_loader_n_workers", "0", *extra]


def made_lock(family: SmallFamily, images: Path, output: Path, *extra: str) -> Lock:
    options = options_of(family, *command(family, images, output, *extra))
    AcceleratorState._reset_state(reset_partial_state=True)
    data = load_data(family.arch, options, 7)
    return lock_of(family.arch, options, data, inputs_of(family.arch, options, data), Accelerator())


@pytest.fixture
def lock(family: SmallFamily, images: Path, tmp_path: Path) -> Lock:
    return made_lock(family, images, tmp_path, "--learning_rate", "3e-4", "--network_args", "rank_dropout=0.1")


def test_a_written_lock_reads_back_as_it_was(lock: Lock, tmp_path: Path) -> None:
    path = write_lock(lock, tmp_path, resumes=False)
    again = Lock.read(path)
    assert again.inputs == dict(lock.inputs) and again.versions == lock.versions and again.environment == lock.environment
    assert again.text() == lock.text()


def test_the_drawn_seed_is_among_the_options(lock: Lock) -> None:
    assert lock.options["seed"] == 7 and lock.run["seed"] == 7


def test_every_option_is_in_the_lock_or_absent_because_it_is_none(lock: Lock, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    values = options_of(family, *command(family, images, tmp_path, "--learning_rate", "3e-4")).values()
    assert set(values) - set(lock.options) - set(lock.defaults) <= set(lock_file.OF_THE_PROCESS)
    assert lock.options["learning_rate"] == 3e-4 and lock.defaults["max_grad_norm"] == 1.0


def test_a_lock_gives_its_options_back_and_the_command_line_wins(lock: Lock, family: SmallFamily, tmp_path: Path) -> None:
    path = write_lock(lock, tmp_path, resumes=False)
    values = options_of(family, "--reproduce", str(path), "--max_grad_norm", "2").values()
    assert values["seed"] == 7 and values["learning_rate"] == 3e-4 and values["network_args"] == ("rank_dropout=0.1",)
    assert values["max_grad_norm"] == 2.0


def test_defaults_of_then_hold_and_those_of_options_that_are_gone_do_not_matter(lock: Lock, family: SmallFamily, tmp_path: Path) -> None:
    then = replace(lock, defaults={**lock.defaults, "max_grad_norm": 0.5, "an_option_of_old": 3})
    values = options_of(family, "--reproduce", str(write_lock(then, tmp_path, resumes=False))).values()
    assert values["max_grad_norm"] == 0.5


def test_a_lock_becomes_a_config_file(lock: Lock, family: SmallFamily, tmp_path: Path) -> None:
    path = write_lock(lock, tmp_path, resumes=False)
    with pytest.raises(SystemExit):
        options_of(family, "--reproduce", str(path), "--output_config", "--config_file", str(tmp_path / "run.toml"))
    values = options_of(family, "--config_file", str(tmp_path / "run.toml")).values()
    assert values["seed"] == 7 and values["learning_rate"] == 3e-4 and values["reproduce"] is None


def test_a_file_that_is_no_lock_is_refused_by_name(family: SmallFamily, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("learning_rate = 1\n")
    with pytest.raises(ValueError, match=r"--reproduce .*run.toml: has no \[defaults\]; give the lock.toml of a run"):
        options_of(family, "--reproduce", str(path))


def test_a_lock_of_another_family_is_refused_before_its_options_are_read(lock: Lock, family: SmallFamily, tmp_path: Path) -> None:
    other = replace(lock, run=lock.run | {"family": "another"}, options={"an_option_of_theirs": 1})
    with pytest.raises(OptionError, match=rf"a run of another family \(another, not {family.arch.name}\); use its own script"):
        main(family.arch.name, ["--reproduce", str(write_lock(other, tmp_path, resumes=False))])


def test_reproduce_in_a_config_file_is_refused(family: SmallFamily, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("reproduce = 'lock.toml'\n")
    with pytest.raises(OptionError, match=r"\(reproduce\): is for the command line only"):
        options_of(family, "--config_file", str(path))


def test_inputs_name_files_text_and_every_folder_of_images(lock: Lock, family: SmallFamily) -> None:
    files = [flag[2:] for flag in family.files[::2]]
    assert {*files, "dataset_config", "text", "images:1.1"} == set(lock.inputs)
    assert lock.inputs["images:1.1"].images == 5


@pytest.mark.parametrize("change", ["a caption", "a picture", "one less"])
def test_another_image_or_caption_is_another_input(change: str, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    text = (folder / "dataset.toml").read_text().replace(str(images), str(folder))
    (folder / "dataset.toml").write_text(text)
    before = made_lock(sdxl, folder, tmp_path)
    if change == "a caption":
        (folder / "1.txt").write_text("a blue dog")
    elif change == "a picture":
        shutil.copy(folder / "0.png", folder / "1.png")
    else:
        (folder / "1.png").unlink()
        (folder / "1.txt").unlink()
    assert [name for name, _ in input_differences(before.inputs, made_lock(sdxl, folder, tmp_path).inputs)] == ["images:1.1"]


def test_moved_inputs_are_the_same_inputs() -> None:
    then, now = Input(place="a/model.safetensors", digest="1", bytes=3), Input(place="b/model.safetensors", digest="1", bytes=3)
    assert list(input_differences({"model": then}, {"model": now})) == []


def reproduced(lock: Lock, family: SmallFamily, images: Path, output: Path, path: Path, *extra: str) -> list[str]:
    options = options_of(family, *command(family, images, output, "--reproduce", str(path), *extra))
    return refusals(lock, options, output / "net-run")


def test_other_inputs_are_refused_by_name_and_may_be_allowed(lock: Lock, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    path = write_lock(lock, tmp_path / "then", resumes=False)
    changed = replace(lock, inputs={**lock.inputs, "images:1.1": Input(place="x", digest="0", images=4)})
    (problem,) = reproduced(changed, family, images, tmp_path, path)
    assert "images:1.1 differs" in problem and "5 images" in problem and "4 images" in problem
    assert "--allow_reproduce_mismatch images:1.1" in problem
    assert reproduced(changed, family, images, tmp_path, path, "--allow_reproduce_mismatch", "images") == []
    assert "did you mean 'images'" in reproduced(changed, family, images, tmp_path, path, "--allow_reproduce_mismatch", "image")[0]


def test_another_number_of_processes_is_refused(lock: Lock, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    path = write_lock(replace(lock, run={**lock.run, "processes": 2}), tmp_path / "then", resumes=False)
    (problem,) = reproduced(lock, family, images, tmp_path, path)
    assert "processes differs: 2 then, 1 now" in problem


def test_other_versions_and_variables_are_warned_of(
    lock: Lock, family: SmallFamily, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lock(lock, tmp_path / "then", resumes=False)
    now = replace(lock, versions={**lock.versions, "torch": "9.9"}, environment={**lock.environment, "OMP_NUM_THREADS": "77"})
    assert reproduced(now, family, images, tmp_path, path) == []
    assert "-> 9.9" in caplog.text and "-> 77" in caplog.text


def test_a_run_is_not_written_over_the_one_that_it_reproduces(lock: Lock, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    path = write_lock(lock, tmp_path / "net-run", resumes=False)
    (problem,) = reproduced(lock, family, images, tmp_path, path)
    assert "give another --output_dir" in problem


def test_an_earlier_lock_is_kept_and_a_resumed_run_leaves_its_own(lock: Lock, tmp_path: Path) -> None:
    write_lock(lock, tmp_path, resumes=False)
    other = replace(lock, run={**lock.run, "seed": 8})
    write_lock(other, tmp_path, resumes=False)
    write_lock(replace(lock, run={**lock.run, "seed": 9}), tmp_path, resumes=True)
    seeds = {path.name: tomllib.loads(path.read_text())["run"]["seed"] for path in tmp_path.glob("*.toml")}
    assert seeds == {"lock.toml": 8, "lock-1.toml": 7, "lock-resumed.toml": 9}
    write_lock(other, tmp_path, resumes=False)
    assert {path.name for path in tmp_path.glob("*.toml")} == {"lock.toml", "lock-1.toml", "lock-2.toml", "lock-2-resumed.toml"}


def test_keep_lock_writes_it_into_the_run_folder(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    options = options_of(family, *command(family, images, tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    data = load_data(family.arch, options, 3)
    keep_lock(family.arch, options, data, inputs_of(family.arch, options, data), Accelerator(), tmp_path / "net-run", resumes=False)
    assert Lock.read(tmp_path / "net-run" / "lock.toml").run["seed"] == 3


def test_places_and_secrets_of_the_environment_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_API_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "TORCHINDUCTOR_CACHE_DIR", "NCCL_ALGO"):
        monkeypatch.setenv(name, "hf_abc")
    found = surroundings.environment()
    assert found["NCCL_ALGO"] == "hf_abc" and list(found.values()).count("hf_abc") == 1


def test_secrets_stand_in_no_command_and_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    from library.core.options import option

    @dataclass(kw_only=True, frozen=True)
    class Tokens:
        """Tokens."""

        token: str | None = option(None, help="a token", secret=True)
        rate: float = option(1.0, help="a rate")

    argv = ["--token", "hf_abc", "--rate", "2"]
    options = parse_command_line([Tokens], argv, prog="test", about="test")
    assert without_secrets(argv, options) == ["--token", "(secret)", "--rate", "2"]
    assert without_secrets(["--token=hf_abc"], options) == ["--token=(secret)"]
    assert "hf_abc" not in json.dumps(lock_file.split_options(options, {}))
