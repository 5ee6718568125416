"""`--plan` on a whole run: the network, its file and its memory, with nothing loaded."""

import json
from pathlib import Path

import pytest
from small_family import SmallFamily

from library.data.inspection.findings import Report, Section
from library.data.inspection.report_html import report_html
from library.data.inspection.report_text import report_text
from library.training.forecast.sections import steps_section
from library.training.run import main

SECTIONS = ["steps", "network", "memory in a training step of 64x64, batch 2 (estimated, nothing was loaded)"]


def plan_file(family: SmallFamily, images: Path, folder: Path, *extra: str) -> dict:
    argv = [*family.files, "--dataset_config", str(images / "dataset.toml"), "--network_module", "networks.lora", "--seed", "1"]
    file = folder / "plan.json"
    main(family.arch.name, [*argv, "--output_dir", str(folder / "out"), "--plan_file", str(file), *extra])
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_plan_holds_steps_network_and_memory(sdxl: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sdxl.arch), "load", lambda *_, **__: pytest.fail("a plan loads nothing"))
    sections = plan_file(sdxl, images, tmp_path, "--max_train_epochs", "3", "--network_train_unet_only")["sections"]
    assert [each["title"] for each in sections] == SECTIONS
    steps, network, memory = (each["facts"] for each in sections)
    assert (steps["steps"], steps["epochs"]) == (12, 3)
    assert network["parameters"] == sum(each["parameters"] for each in network["modules"])
    assert memory["gpu_peak"] == max(phase["bytes"] for phase in memory["phases"])


@pytest.mark.slow
def test_options_in_vain_are_findings_of_the_plan(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    findings = plan_file(sdxl, images, tmp_path, "--max_train_epochs", "3", "--max_train_steps", "7")["findings"]
    assert any(each["topic"] == "options" and each["text"].startswith("--max_train_steps has no effect") for each in findings)


def test_what_keeps_the_network_from_being_built_is_an_error_of_the_plan(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    content = plan_file(sdxl, images, tmp_path, "--network_args", "conv_dimm=3")
    assert any(each["level"] == "error" and "did you mean 'conv_dim'?" in each["text"] for each in content["findings"])
    assert content["sections"] == []


def test_an_epoch_that_is_cut_short_is_said() -> None:
    section = steps_section({"steps": 10, "steps_per_epoch": 4, "processes": 1}, accumulated=2)
    assert section.rows == (("1", "2", "4", "3", "10"),)
    assert section.lines == ("the last epoch ends after 2 of its 4 steps",)


def test_a_terminal_has_the_digest_and_a_page_has_all_rows() -> None:
    section = Section(title="things", header=("name", "size"), rows=(("a<b", "1"), ("c", "2")), digest=(("two", "3"),), lines=("a word",))
    report = Report(findings=(), sections=(section,))
    assert report_text(report).endswith("things\nname  size\ntwo      3\na word")
    page = report_html(report, ())
    assert "a&lt;b" in page and "All 2" in page and "a word" in page
