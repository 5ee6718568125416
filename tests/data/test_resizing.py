"""Resizing: the area rule by its definition, and Pillow's filters by name."""

from typing import get_args

import numpy as np
import pytest
from dataset_samples import noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.images.resizing import INTERPOLATIONS, resize, resize_mask
from library.data.options import Interpolation

SIDES = st.integers(1, 40)


def share_matrix(length: int, count: int) -> np.ndarray:
    """(count, length): the share of each input pixel in each output pixel, written from the definition of area averaging."""
    edges = np.arange(count + 1) * length / count
    inside = np.minimum(edges[1:, None], np.arange(length) + 1) - np.maximum(edges[:-1, None], np.arange(length))
    return inside.clip(0) * count / length


def means(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    down, across = share_matrix(pixels.shape[0], size[1]), share_matrix(pixels.shape[1], size[0])
    return np.einsum("ih,hwc,jw->ijc", down, pixels.astype(float), across)


@pytest.mark.parametrize("size", [(20, 11), (52, 36), (1, 1), (30, 36)])
def test_shrinking_averages_by_area(size):
    pixels = noise((53, 37))
    assert np.abs(resize(Image.fromarray(pixels), size) - means(pixels, size)).max() <= 0.51


@given(SIDES, SIDES, SIDES, SIDES)
def test_area_is_the_mean_of_what_a_pixel_covers_when_enlarging_too(width, height, new_width, new_height):
    pixels = noise((width, height))
    resized = resize(Image.fromarray(pixels), (new_width, new_height), "area")
    assert np.abs(resized - means(pixels, (new_width, new_height))).max() <= 0.51


@pytest.mark.parametrize("size", [(40, 24), (12, 24), (16, 12), (12, 16)])
def test_growing_on_a_side_is_lanczos(size):
    image = Image.fromarray(noise((16, 16)))
    assert np.array_equal(resize(image, size), np.asarray(image.resize(size, Image.Resampling.LANCZOS)))


@pytest.mark.parametrize(("name", "resampling"), [(name, each) for name, each in INTERPOLATIONS.items() if each is not None])
@pytest.mark.parametrize("size", [(9, 7), (40, 24)])
def test_a_named_interpolation_is_that_of_pillow(name, resampling, size):
    image = Image.fromarray(noise((16, 16)))
    assert np.array_equal(resize(image, size, name), np.asarray(image.resize(size, resampling)))


@pytest.mark.parametrize("name", [None, *INTERPOLATIONS])
def test_the_same_size_changes_nothing(name):
    pixels = noise((16, 12))
    assert np.array_equal(resize(Image.fromarray(pixels), (16, 12), name), pixels)


def test_every_value_of_the_option_has_its_filter():
    assert set(get_args(Interpolation)) == set(INTERPOLATIONS)


@given(SIDES, SIDES, SIDES, SIDES)
def test_a_mask_stays_between_its_values(width, height, new_width, new_height):
    mask = noise((width, height), channels=1)[..., 0] // 2 + 50
    resized = resize_mask(Image.fromarray(mask), (new_width, new_height))
    assert resized.shape == (new_height, new_width)
    assert resized.min() >= mask.min()
    assert resized.max() <= mask.max()
