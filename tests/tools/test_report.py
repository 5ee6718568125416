"""The report of a run: everything that is there is on the page, and what is not or is damaged is said."""

import html
import json
import os
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import BANDS, figures, write_preview, write_run

from library.core.options import OptionError
from tools.report import main
from tools.run_report.facts import state_of
from tools.run_report.reading import find_run, read_log, read_run


@pytest.fixture
def output(tmp_path: Path, small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path) -> Path:
    return write_run(tmp_path / "out", small_sdxl_modules, small_sdxl_file)


def report(output: Path, *arguments: object) -> str:
    """The page of the run in a folder."""
    main([str(output), "--open", "no", *map(str, arguments)])
    return (output / "net-run" / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_curves_previews_layers_data_configuration_and_environment(output: Path) -> None:
    page = report(output)
    for title in ("Loss", "Loss by timestep", "Learning rates", "Norms of gradients", "Speed", "Memory"):
        assert f"<b>{title}</b>" in page
    assert all(f"</i>{band} <em>" in page for band in BANDS)
    assert page.count('class="heat"') >= 3 and "input_blocks" in page and "epoch 2, step 6" in page
    assert page.count('src="data:image/jpeg') == 2 * 2 + 2, "two moments at two strengths, and two images of the dataset"
    assert "max_grad_norm" in page and "2.13.0" in page and "finished" in page and "lock file" not in page


def test_a_star_tells_averaged_weights_from_those_of_the_same_step(output: Path) -> None:
    assert "A star marks averaged weights" not in report(output)
    shutil.copyfile(output / "net-000001.safetensors", output / "net-000001_ema.safetensors")
    page = report(output)
    labels = re.findall(r'<text class="x"[^>]*>([^<]*)<title>net-000001(_ema)? ', page)
    assert labels and {bool(ema): label.endswith("*") for label, ema in labels} == {False: False, True: True}
    assert "A star marks averaged weights" in page


def test_the_page_needs_nothing_from_elsewhere(output: Path) -> None:
    page = report(output)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "default-src 'none'" in page and "@import" not in page and "url(" not in page


class Balance(HTMLParser):
    """Notes tags that are closed in another order than they were opened."""

    VOID = ("meta", "img", "br", "path", "circle", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def test_every_tag_is_closed_and_text_of_files_is_escaped(output: Path) -> None:
    page, balance = report(output), Balance()
    balance.feed(page)
    assert not balance.wrong and not balance.open
    assert "<cat>" not in page and "a red &lt;cat&gt; &amp; a dog" in page and "picture &lt;number&gt; 1" in page


def test_every_drawing_is_sound_xml(output: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", report(output), re.DOTALL)
    assert len(drawings) > 8
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_the_numbers_for_the_script_are_those_of_the_log(output: Path) -> None:
    charts = [json.loads(text.replace("&quot;", '"')) for text in re.findall(r'data-chart="(.*?)"', report(output))]
    losses = {name: points for name, _, points in charts[0]["lines"]}
    assert losses["each step"] == [[step, float(f"{1 / step:.5g}")] for step in range(1, 7)]


def test_a_grid_has_a_row_for_each_strength_and_a_column_for_each_moment(output: Path) -> None:
    page = report(output)
    assert re.findall(r'class="strength">x ([\d.]+)<', page) == ["0.5", "1"]
    assert re.findall(r"<th>(epoch \d, step \d)</th>", page) == ["epoch 1, step 3", "epoch 2, step 6"]


def test_the_newest_of_previews_of_one_moment_is_shown(output: Path) -> None:
    write_preview(output / "sample" / "net_e000002_00_x1_20270102030405_8.png")
    seeds = {(preview.moment, preview.strength): preview.seed for preview in read_run(output, "net").previews}
    assert seeds == {("e000001", 0.5): 7, ("e000001", 1.0): 7, ("e000002", 0.5): 7, ("e000002", 1.0): 8}


def test_files_of_other_runs_in_the_folder_are_not_shown(output: Path) -> None:
    for name in ("net2.safetensors", "net-notes.safetensors", "other-000001.safetensors"):
        (output / name).write_bytes(b"")
    write_preview(output / "sample" / "net2_e000001_00_20260102030405_7.png")
    run = read_run(output, "net")
    assert {path.name for path in run.saved} == {"net.safetensors", "net-000001.safetensors"} and len(run.previews) == 4


def test_files_of_an_earlier_run_of_the_same_name_are_not_shown(output: Path) -> None:
    log = output / "net-run" / "log.jsonl"
    log.write_text(log.read_text().replace('"seconds": 0.0}', '"seconds": 0.0, "time": 1800000000.0}', 1))
    older, newer = [output / "net-000001.safetensors"], [output / "net.safetensors"]
    for path in (output / "sample").iterdir():
        (older if "e000001" in path.name else newer).append(path)
    for path in (*older, *newer):
        written = 1800000100.0 - 1000 * (path in older)
        os.utime(path, (written, written))
    run = read_run(output, "net")
    assert {*run.saved, *(preview.path for preview in run.previews)} == set(newer)


def test_a_run_that_was_made_longer_is_not_finished_before_its_new_end(output: Path) -> None:
    own = output / "net-run"
    (own / "lock-resumed.toml").write_text((own / "lock.toml").read_text().replace("steps = 6", "steps = 60"))
    run = read_run(output, "net")
    assert run.steps == 60 and state_of(run) == "in progress"


def test_the_command_can_be_copied(output: Path) -> None:
    lock = output / "net-run" / "lock.toml"
    lock.write_text(lock.read_text().replace('"--x"', '"--x", "it\'s $5"'))
    assert shlex.quote("it's $5") in html.unescape(report(output))


def test_damaged_lines_are_named_and_the_others_drawn(output: Path) -> None:
    path = output / "net-run" / "log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{not json", '{"step": "x"}', *lines[3:], '{"step": 9, "epo']))
    log = read_log(path)
    assert log.problems == [
        f"log.jsonl: the last line (line {len(lines) + 3}) is cut off",
        f"log.jsonl: 2 of {len(lines) + 3} lines are damaged and left out: 4, 5",
    ]
    assert [point.step for point in log.figures["loss/current"]] == [1, 2, 3, 4, 5, 6]
    assert "2 of 11 lines are damaged" in report(output)


def test_values_that_are_not_finite_are_gaps_that_the_legend_counts(output: Path) -> None:
    with (output / "net-run" / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "epoch": 2, "seconds": 4.5, **figures(7), "loss/current": "nan"}) + "\n")
        file.write(json.dumps({"step": 8, "epoch": 2, "seconds": 5.0, **figures(8)}) + "\n")
    page = report(output)
    assert "(1 not finite)" in page
    drawn = re.search(r'<path class="line c1 faint" d="(.*?)"', page)
    assert drawn is not None and drawn[1].count("M") == 2


def test_a_run_of_which_only_the_log_is_left_is_shown_with_what_is_missing_said(output: Path) -> None:
    for path in (output / "net-run" / "lock.toml", *output.glob("*.safetensors"), *(output / "sample").iterdir()):
        path.unlink()
    page = report(output)
    for sentence in ("lock file", "No previews", "No saved file yet", "Not known: the run has no readable lock file"):
        assert sentence in page
    assert "<b>Loss</b>" in page


def test_a_run_that_has_just_begun_has_a_page(output: Path) -> None:
    (output / "net-run" / "log.jsonl").write_text('{"event": "begun", "step": 0, "epoch": 1, "seconds": 0.0}\n')
    assert "No figures yet" in report(output)


def test_images_that_are_gone_and_broken_files_are_said(output: Path) -> None:
    (output.parent / "images" / "data.toml").unlink()
    (output / "net.safetensors").write_bytes(b"no header")
    next((output / "sample").iterdir()).write_bytes(b"no picture")
    page = report(output)
    assert "The images cannot be read now" in page and "net.safetensors: " in page and "not a safetensors file" in page
    assert "no picture (" in page


def test_several_runs_in_a_folder_are_named_and_one_is_chosen(
    output: Path, small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path
) -> None:
    (output / "other-run").mkdir()
    with pytest.raises(ValueError, match="holds 2 runs; choose one with --name: net, other"):
        find_run(output, None)
    with pytest.raises(ValueError, match="--name nett: .* holds net, other"):
        find_run(output, "nett")
    assert find_run(output, "net") == find_run(output / "net-run", None) == (output.resolve(), "net")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        main([str(tmp_path), "--open", "no"])
    with pytest.raises(ValueError, match="no such folder"):
        main([str(tmp_path / "none"), "--open", "no"])


def test_mistakes_of_the_command_are_told(output: Path) -> None:
    with pytest.raises(OptionError, match="did you mean '--name'"):
        main([str(output), "--nam", "net"])


def test_the_page_goes_where_it_is_asked_to(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(output), "--open", "no", "--out", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>") and "page.html" in capsys.readouterr().out
