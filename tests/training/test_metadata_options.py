"""What the user says of a file stands in it under modelspec's names."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from library.core.tensor_file import read_header
from library.training.metadata import MetadataOptions, thumbnail
from tests.training.small_family import SmallFamily

GIVEN = {
    "usage_hint": "at 0.8",
    "merged_from": "a, b",
    "preprocessor": "canny",
    "is_negative_embedding": "false",
    "thumbnail": "data:image/png;base64,AAAA",
}


def test_every_metadata_option_stands_in_the_file(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    extra = [word for name, value in GIVEN.items() for word in (f"--metadata_{name}", value)]
    metadata = read_header(family.run(images, tmp_path, "--max_train_steps", "1", *extra).file).metadata
    assert {name: metadata.get(f"modelspec.{name}") for name in GIVEN} == GIVEN


def test_bounds_of_timesteps_stand_in_the_file(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    metadata = read_header(family.run(images, tmp_path, "--max_train_steps", "1", "--min_timestep", "200").file).metadata
    assert metadata["modelspec.timestep_range"] == "200,1000"


def test_the_file_names_the_schedule_that_its_rate_followed(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    given = ("--max_train_steps", "1", "--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2")
    assert read_header(family.run(images, tmp_path, *given).file).metadata["ss_lr_scheduler"] == "StepLR"


def test_a_thumbnail_file_becomes_a_small_jpeg(tmp_path: Path) -> None:
    Image.new("RGBA", (800, 400), (255, 0, 0, 255)).save(tmp_path / "a.png")
    head, data = (thumbnail(str(tmp_path / "a.png")) or "").split(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert head == "data:image/jpeg;base64" and picture.size == (256, 128)


@pytest.mark.parametrize("name", ["missing.png", "text.png"])
def test_a_thumbnail_that_is_no_picture_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (problem,) = MetadataOptions(metadata_thumbnail=str(tmp_path / name)).check()
    assert problem.startswith("--metadata_thumbnail") and name in problem
