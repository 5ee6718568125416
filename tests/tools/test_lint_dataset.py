"""The linter as a user starts it: exit status, messages, files, with and without a model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.core.options import OptionError
from library.models.architecture import architecture_named, architecture_names
from tools.lint_dataset import main


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset file over four sound pictures with captions; nothing to complain of."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(4):
        Image.effect_noise((64, 64), 60 + n).convert("RGB").save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a cat, red, number {n}")
    path = tmp_path / "data.toml"
    path.write_text(f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n")
    return path


def lint(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def report(path: Path, *arguments: object) -> dict[str, Any]:
    lint(*arguments, "--json", path)
    return json.loads(path.read_text())


def test_sound_data_has_exit_status_0(dataset: Path, capsys: pytest.CaptureFixture[str]):
    assert lint(dataset, "--strict") == 0
    assert capsys.readouterr().out.startswith("4 images, 4 uses and 2 batches an epoch\n0 errors, 0 warnings, 0 notes\n")


def test_warnings_are_exit_status_1_only_with_strict(dataset: Path):
    (dataset.parent / "pictures" / "orphan.txt").write_text("x")
    assert lint(dataset) == 0 and lint(dataset, "--strict") == 1


def test_every_bad_image_is_named_at_once_and_the_others_are_inspected(dataset: Path, tmp_path: Path):
    folder = dataset.parent / "pictures"
    (folder / "1.png").write_bytes(b"not an image")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-60])
    (folder / "orphan.txt").write_text("x")
    assert lint(dataset) == 1
    found = report(tmp_path / "r.json", dataset)
    errors = [each["text"] for each in found["findings"] if each["level"] == "error"]
    assert len(errors) == 2 and "1.png" in errors[0] and "2.png" in errors[1]
    assert found["datasets"][0]["images"] == 2 and any(each["topic"] == "unread" for each in found["findings"])


def test_bad_images_that_the_run_would_skip_are_warnings(dataset: Path, tmp_path: Path):
    (dataset.parent / "pictures" / "1.png").write_bytes(b"not an image")
    found = report(tmp_path / "r.json", dataset, "--bad_images", "skip")
    assert [(each["level"], "1.png" in each["text"]) for each in found["findings"] if each["topic"] == "images"] == [("warning", True)]


def test_mistakes_of_the_dataset_file_are_a_report_too(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset.write_text(dataset.read_text() + "num_repeat = 2\nflip_aug = 'yes'\n")
    assert lint(dataset, "--html", tmp_path / "page.html") == 1
    out = capsys.readouterr().out
    assert "2 errors" in out and "did you mean 'num_repeats'" in out and "data.toml line 6" in out
    assert "num_repeats" in (tmp_path / "page.html").read_text()


def test_the_page_and_the_json_are_written_where_asked(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert lint(dataset, "--html", tmp_path / "new" / "page.html", "--json", tmp_path / "r.json", "--samples", 1) == 0
    assert (tmp_path / "new" / "page.html").read_text().count("<figure>") == 1
    assert json.loads((tmp_path / "r.json").read_text())["format"] == 1
    assert str(tmp_path / "r.json") in capsys.readouterr().out


def test_options_of_the_data_count(dataset: Path, tmp_path: Path):
    assert report(tmp_path / "r.json", dataset, "--dataset_repeats", 5)["datasets"][0]["uses"] == 20


def test_folders_named_by_convention_are_inspected_without_a_file(dataset: Path, tmp_path: Path):
    folder = dataset.parent / "pictures"
    (tmp_path / "train").mkdir()
    folder.rename(tmp_path / "train" / "3_cat")
    found = report(tmp_path / "r.json", "--train_data_dir", tmp_path / "train", "--resolution", 64, "--caption_extension", ".txt")
    assert found["datasets"][0]["uses"] == 12


@pytest.mark.parametrize("family", [None, *architecture_names()])
def test_caches_are_forecast_for_the_family_or_for_all(dataset: Path, tmp_path: Path, family: str | None):
    found = report(tmp_path / "r.json", dataset, *(["--family", family] if family else []))
    families = [architecture_named(name) for name in ([family] if family else architecture_names())]
    assert [each["model"] for each in found["caches"]] == [each.title for each in families]
    for each, arch in zip(found["caches"], families, strict=True):
        latents = arch.latent_channels * math.prod(side // arch.pixels_per_latent for side in (64, 64)) * 4
        assert (each["latent_entries"], each["latent_bytes"], each["text_entries"]) == (4, 4 * latents, 4)
        assert each["text_bytes"] > 0 and each["is_estimate"]


def test_a_models_tokenizer_counts_the_captions(dataset: Path, tmp_path: Path, small_sdxl_file: Path):
    (dataset.parent / "pictures" / "0.txt").write_text("a " * 80)
    found = report(tmp_path / "r.json", dataset, "--family", "sdxl", "--model", small_sdxl_file)
    (cache,) = found["caches"]
    assert not cache["is_estimate"] and cache["over_long"] == 1
    (cut,) = [each for each in found["findings"] if each["topic"] == "length"]
    assert "by its tokenizer" in cut["text"] and cut["details"][0].endswith("0.png: 5 tokens too long")


def test_mistakes_of_the_command_are_told_together(dataset: Path, tmp_path: Path):
    with pytest.raises(OptionError) as caught:
        lint(dataset, "--family", "sdxxl", "--samples", 0, "--model", tmp_path / "none", "--resolutions", 64, "--json", "r.txt")
    text = str(caught.value)
    parts = (
        "--family sdxxl",
        "--samples 0",
        "no such file or folder",
        "did you mean '--resolution'",
        "--json r.txt: give a file that ends",
    )
    assert all(part in text for part in parts)


def test_samples_without_a_page_are_refused(dataset: Path):
    with pytest.raises(OptionError, match="--samples 3: has no effect without --html"):
        lint(dataset, "--samples", 3)


def test_a_model_without_a_family_is_refused(dataset: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="--family"):
        lint(dataset, "--model", tmp_path)
