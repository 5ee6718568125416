"""The demo does what the README says: the adapter learns the look and leaves the known words alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from library.models.architecture import architecture_names
from tools.demo import DEMOS, MODELS, ORDINARY, TAUGHT, main, make_dataset, taught_pictures
from tools.toys.pictures import NEW_LOOK_WORD


def test_the_dataset_has_the_look_and_ordinary_pictures(tmp_path: Path) -> None:
    make_dataset(tmp_path, seed=7)
    captions = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(captions) == len(taught_pictures()) == TAUGHT + ORDINARY <= 24
    assert sum(NEW_LOOK_WORD in text for text in captions) == TAUGHT


@pytest.mark.slow
@pytest.mark.parametrize("family", DEMOS)
def test_the_demo_teaches_the_look(family: str, tmp_path: Path) -> None:
    assert main(["--family", family, "--output", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["look_when_asked_adapter"] >= 0.8 and scores["look_when_asked_base"] <= 0.1 and scores["look_unasked_adapter"] <= 0.1
    assert scores["words_adapter"] >= 0.8 * scores["words_base"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 800


def test_every_family_has_a_small_model_and_a_demo() -> None:
    assert set(DEMOS) == set(MODELS) == set(architecture_names())
