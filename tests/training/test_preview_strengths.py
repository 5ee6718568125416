"""`--sample_strengths`: every preview at several strengths of the network, which trains on as if nothing had been."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_family import SmallFamily

from library.core.command_line import parse_command_line
from library.core.rules import without_effect
from library.training.previews import PreviewOptions

ASKED = ("--max_train_steps", "3", "--sample_every_n_steps", "2")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    return path


def pixels(folder: Path, pattern: str) -> np.ndarray:
    (path,) = (folder / "sample").glob(pattern)
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_strengths_are_drawn_from_the_base_to_the_network_and_change_no_loss(
    family: SmallFamily, images: Path, prompts: Path, tmp_path: Path
) -> None:
    plain = family.run(images, tmp_path / "plain", *ASKED, "--sample_prompts", str(prompts), "--sample_at_first")
    drawn = family.run(images, tmp_path / "drawn", *ASKED, "--sample_prompts", str(prompts), "--sample_strengths", "0", "0.5", "1")
    assert drawn.losses == plain.losses and drawn.file.stat().st_size == plain.file.stat().st_size
    names = {re.sub(r"\d{14}", "DATE", path.name) for path in (tmp_path / "drawn" / "sample").iterdir()}
    assert names == {f"net_000002_00_x{strength}_DATE_7.png" for strength in ("0", "0.5", "1")}
    base, whole = pixels(tmp_path / "drawn", "*_x0_*"), pixels(tmp_path / "drawn", "*_x1_*")
    assert (base == pixels(tmp_path / "plain", "net_000000_*")).all(), "at 0 the base alone draws, as before the first step"
    assert (whole == pixels(tmp_path / "plain", "net_000002_*")).all() and (whole != base).any()


def test_strengths_without_prompts_are_said_to_have_no_effect() -> None:
    options = parse_command_line([PreviewOptions], ["--sample_strengths", "0", "1"], prog="test", about="test")
    assert list(without_effect(options, PreviewOptions.RULES)) == ["--sample_strengths has no effect: there are no --sample_prompts"]
