"""`--plan`: what a run would see, from the same options, with nothing loaded and nothing trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_family import SmallFamily

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.data.building import build_training_data
from library.data.options import DataOptions
from library.models.architecture import Architecture
from library.models.forecast import model_facts
from library.training.plan import PAGE, PlanOptions, plan, show
from library.training.run import main


def plan_of(family: SmallFamily, images: Path, folder: Path, *extra: str):
    groups = [family.arch.ModelOptions, DataOptions, PlanOptions]
    argv = [*family.files, "--dataset_config", str(images / "dataset.toml"), *extra]
    options = parse_command_line(groups, argv, prog="test", about="test")
    data = build_training_data(
        options[DataOptions], seed=1, resolution_step=family.arch.resolution_step, default_resolution=family.arch.default_resolution
    )
    return plan(family.arch, options, data, run={"steps_per_epoch": 2, "steps": 8, "processes": 2}, folder=folder)


def test_a_plan_is_printed_with_the_runs_numbers(family: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan_of(family, images, tmp_path, "--plan")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "5 images, 5 uses and 4 batches an epoch, 2 steps an epoch, 8 steps in all, 2 processes"
    assert list(tmp_path.iterdir()) == []


def test_no_weights_are_loaded_and_the_models_tokenizer_counts(
    family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(family.arch), "load", lambda *_, **__: pytest.fail("a plan loads nothing"))
    report = plan_of(family, images, tmp_path, "--plan")
    assert [(each.model, each.is_estimate, each.over_long) for each in report.caches] == [(family.arch.title, False, 0)]


@pytest.mark.parametrize("name", ["plan.json", "plan.html"])
def test_a_plan_is_written_in_the_format_of_its_file(name: str, sdxl: SmallFamily, images: Path, tmp_path: Path):
    plan_of(sdxl, images, tmp_path, "--plan_file", str(tmp_path / name))
    text = (tmp_path / name).read_text()
    assert json.loads(text)["run"]["steps"] == 8 if name.endswith("json") else text.count("<figure>") == 5


def test_debug_dataset_writes_the_page_into_the_output_folder(
    sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("webbrowser.open", lambda _: pytest.fail("nobody sits at a terminal here"))
    plan_of(sdxl, images, tmp_path, "--debug_dataset")
    assert (tmp_path / PAGE).read_text().count("<figure>") == 5


def test_the_page_is_opened_where_there_is_a_terminal_and_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda place: opened.append(place) or True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    assert show(tmp_path / "a b.html")
    assert opened == [(tmp_path / "a b.html").as_uri()]


def test_a_file_of_no_format_is_refused():
    with pytest.raises(OptionError, match=r"--plan_file x\.txt: .*\.json or \.html"):
        parse_command_line([PlanOptions], ["--plan_file", "x.txt"], prog="test", about="test")


@pytest.mark.parametrize(
    ("argv", "is_asked"), [([], False), (["--plan"], True), (["--plan_file", "a.json"], True), (["--debug_dataset"], True)]
)
def test_each_option_alone_asks_for_a_plan(argv: list[str], is_asked: bool):
    assert parse_command_line([PlanOptions], argv, prog="test", about="test")[PlanOptions].is_asked == is_asked


def test_a_tokenizer_that_is_not_there_makes_lengths_an_estimate(
    family: SmallFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def nowhere(*_: object, **__: object) -> None:
        raise ValueError("no tokenizer found")

    for name in ("find_vocabularies", "find_tokenizers"):
        monkeypatch.setattr(f"library.models.{family.arch.name}.forecast.{name}", nowhere, raising=False)
    facts = model_facts(family.arch, family.arch.ModelOptions(pretrained_model_name_or_path=str(tmp_path)))
    assert facts.over is None and facts.caption_limit and "the lengths of captions are estimated: no tokenizer found" in caplog.text


def test_a_family_without_a_forecast_has_the_facts_of_its_latents(sdxl: SmallFamily):
    other = type("Other", (type(sdxl.arch),), {"__module__": "elsewhere"})()
    assert isinstance(other, Architecture)
    facts = model_facts(other, None)
    assert (facts.latent_channels, facts.caption_limit, facts.over, facts.text_bytes) == (4, None, None, None)


def test_the_script_plans_and_makes_nothing(sdxl: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [*sdxl.files, "--dataset_config", str(images / "dataset.toml"), "--network_module", "networks.loha"]
    main("sdxl", [*argv, "--output_dir", str(tmp_path / "out"), "--max_train_epochs", "3", "--plan"])
    assert capsys.readouterr().out.startswith("5 images, 5 uses and 4 batches an epoch, 4 steps an epoch, 12 steps in all\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's launcher is not reliable there")
def test_of_two_processes_one_plans_for_both(sdxl: SmallFamily, images: Path, tmp_path: Path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sdxl_train_network.py"]
    run = [*sdxl.files, "--dataset_config", str(images / "dataset.toml"), "--network_module", "networks.loha", "--plan"]
    command = [*launch, *run, "--max_train_epochs", "3", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 images, 5 uses and 4 batches an epoch, 2 steps an epoch, 6 steps in all, 2 processes\n")
    assert done.stdout.count(" images, 5 uses") == 1
