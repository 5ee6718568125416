"""The small SDXL that comes with the project draws what its caption says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.inference.generate import Generator, Request
from library.inference.images import to_images
from library.models.architecture import architecture_named
from tools.toys.pictures import caption, has_new_look, random_picture, read, with_new_look

ROOT = Path(__file__).parents[3]
FILE = ROOT / "assets" / "toy_sdxl.safetensors"
SDXL = architecture_named("sdxl")


@pytest.fixture(scope="module")
def generator() -> Generator:
    options = SDXL.ModelOptions(pretrained_model_name_or_path=str(FILE))
    device, dtype = torch.device("cpu"), torch.float32
    models = SDXL.load(options, device=device, dtype=dtype)
    return Generator(arch=SDXL, models=models, model_options=options, device=device, dtype=dtype)


def requests(captions: list[str]) -> list[Request]:
    common = {"negative": "", "width": 64, "height": 64, "steps": 20, "scale": 4.0, "sampler": "ddim"}
    return [Request(prompt=text, seed=index, **common) for index, text in enumerate(captions)]


@pytest.mark.slow
def test_nine_of_ten_pictures_show_what_the_caption_says(generator: Generator) -> None:
    pictures = [random_picture(np.random.default_rng((5, index))) for index in range(64)]
    asked = requests([caption(picture) for picture in pictures])
    images = [image for start in range(0, 64, 16) for image in to_images(generator.draw(asked[start : start + 16]))]
    readings = [read(image) for image in images]
    agrees = [
        (reading.shape, reading.colour) == (picture.shape, picture.colour) for reading, picture in zip(readings, pictures, strict=True)
    ]
    assert sum(agrees) >= 0.9 * 64


@pytest.mark.slow
def test_it_does_not_know_the_new_look(generator: Generator) -> None:
    pictures = [with_new_look(random_picture(np.random.default_rng((6, index)))) for index in range(16)]
    images = to_images(generator.draw(requests([caption(picture) for picture in pictures])))
    assert sum(map(has_new_look, images)) <= 1


def test_the_file_is_small() -> None:
    assert FILE.stat().st_size <= 12_000_000
