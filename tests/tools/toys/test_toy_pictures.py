"""The toy pictures and their reader: what is drawn is read, what is not there is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tools.toys.pictures import (
    NEW_LOOK_WORD,
    Picture,
    Reading,
    all_pictures,
    caption,
    draw,
    has_new_look,
    random_picture,
    read,
    with_new_look,
)

COUNT = 60


def drawn(seed: int, *, new_look: bool = False) -> list[tuple[Picture, Image.Image]]:
    rng = np.random.default_rng(seed)
    pictures = [random_picture(rng) for _ in range(COUNT)]
    pictures = [with_new_look(picture) if new_look else picture for picture in pictures]
    return [(picture, draw(picture, seed=n)) for n, picture in enumerate(pictures)]


def agrees(picture: Picture, reading: Reading) -> bool:
    return (picture.shape, picture.colour, picture.background) == (reading.shape, reading.colour, reading.background)


@pytest.mark.parametrize("new_look", [False, True])
def test_drawn_pictures_are_read(new_look: bool) -> None:
    pairs = [(picture, read(image)) for picture, image in drawn(1, new_look=new_look)]
    assert sum(agrees(picture, reading) for picture, reading in pairs) >= COUNT - 1
    assert sum(picture.texture == reading.texture for picture, reading in pairs) >= 0.9 * COUNT


def test_blurred_and_noisy_pictures_are_read() -> None:
    rng = np.random.default_rng(2)
    right = 0
    for picture, image in drawn(2):
        noisy = np.asarray(image) + rng.normal(0, 15, (64, 64, 3))
        blurred = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
        right += agrees(picture, read(blurred))
    assert right >= 0.95 * COUNT


def test_noise_is_not_read() -> None:
    rng = np.random.default_rng(3)
    cells = [rng.integers(0, 256, (size, size, 3)).astype(np.uint8) for size in (64, 16, 8, 4) for _ in range(8)]
    readings = [read(Image.fromarray(cell).resize((64, 64), Image.Resampling.NEAREST)) for cell in cells]
    assert all(reading.shape is None and reading.colour is None for reading in readings)


@pytest.mark.parametrize("grey", [0, 128, 252])
def test_blank_is_not_read(grey: int) -> None:
    assert read(Image.new("RGB", (64, 64), (grey, grey, grey))) == Reading()


def test_new_look_is_seen_only_where_it_is() -> None:
    assert all(has_new_look(image) for _, image in drawn(4, new_look=True))
    assert not any(has_new_look(image) for _, image in drawn(4))


def test_captions_are_distinct() -> None:
    pictures = all_pictures()
    plain = {caption(picture) for picture in pictures}
    new = {caption(with_new_look(picture)) for picture in pictures}
    assert len(plain) == len(pictures)
    assert not plain & new
    assert all(text.endswith(f" on a {NEW_LOOK_WORD} background") for text in new)


def test_the_same_seed_draws_the_same_picture() -> None:
    picture = Picture(shape="ring", colour="cyan", texture="dotted", background="white")
    assert draw(picture, seed=5).tobytes() == draw(picture, seed=5).tobytes()
    assert draw(picture, seed=5).tobytes() != draw(picture, seed=6).tobytes()
    assert draw(picture, size=128, seed=5).size == (128, 128)
