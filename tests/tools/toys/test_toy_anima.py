"""The small Anima that comes with the project draws what its caption says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.inference.generate import Generator, Request
from library.inference.images import to_images
from library.models.architecture import architecture_named
from tools.toys.pictures import NEW_LOOK_WORD, caption, has_new_look, random_picture, read

FOLDER = Path(__file__).parents[3] / "assets" / "toy_anima"
ANIMA = architecture_named("anima")


@pytest.fixture(scope="module")
def generator() -> Generator:
    files = {"pretrained_model_name_or_path": "dit", "qwen3": "qwen3", "vae": "vae"}
    options = ANIMA.ModelOptions(**{option: str(FOLDER / f"{name}.safetensors") for option, name in files.items()})
    device, dtype = torch.device("cpu"), torch.float32
    models = ANIMA.load(options, device=device, dtype=dtype)
    return Generator(arch=ANIMA, models=models, model_options=options, device=device, dtype=dtype)


def requests(captions: list[str]) -> list[Request]:
    common = {"negative": "", "width": 64, "height": 64, "steps": 20, "scale": 4.0, "sampler": "euler"}
    return [Request(prompt=text, seed=index, **common) for index, text in enumerate(captions)]


@pytest.mark.slow
def test_nine_of_ten_pictures_show_what_the_caption_says(generator: Generator) -> None:
    pictures = [random_picture(np.random.default_rng((5, index))) for index in range(64)]
    asked = requests([caption(picture) for picture in pictures])
    images = [image for start in range(0, 64, 16) for image in to_images(generator.draw(asked[start : start + 16]))]
    pairs = list(zip(pictures, map(read, images), strict=True))
    agrees = [(seen.shape, seen.colour, seen.background) == (asked.shape, asked.colour, asked.background) for asked, seen in pairs]
    assert sum(agrees) >= 0.9 * 64


@pytest.mark.slow
def test_the_word_of_the_new_look_means_nothing_to_it(generator: Generator) -> None:
    pictures = [random_picture(np.random.default_rng((6, index))) for index in range(16)]
    images = to_images(generator.draw(requests([f"{caption(picture)}, {NEW_LOOK_WORD} style" for picture in pictures])))
    assert sum(map(has_new_look, images)) <= 1


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000
