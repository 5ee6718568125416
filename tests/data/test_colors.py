"""Colour augmentation: how often, how much, and what it leaves alone."""

import colorsys
import random

import numpy as np
import pytest
from dataset_samples import noise

from library.data.images.colors import ColorChange, drawn_color

DRAWN = [drawn_color(random.Random(seed)) for seed in range(6000)]


def test_a_third_of_the_uses_are_changed_half_of_them_in_hue():
    changed = [change for change in DRAWN if change is not None]
    assert 0.31 < len(changed) / len(DRAWN) < 0.35
    assert 0.45 < sum(change.gamma == 1 for change in changed) / len(changed) < 0.55


def test_a_change_is_of_hue_or_of_gamma_and_small():
    for change in DRAWN:
        assert change is None or (change.degrees == 0) != (change.gamma == 1)
        assert change is None or (abs(change.degrees) <= 16 and 0.95 <= change.gamma <= 1.05)
    assert max(change.degrees for change in DRAWN if change) > 15
    assert min(change.gamma for change in DRAWN if change) < 0.952


@pytest.mark.parametrize("degrees", [-16, 11.25, 16])
def test_the_hue_is_turned_and_the_rest_stays(degrees):
    pixels = noise((16, 16))
    turned = ColorChange(degrees=degrees).applied(pixels)
    for before, after in zip(pixels.reshape(-1, 3) / 255, turned.reshape(-1, 3) / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)
        assert np.abs(np.array(expected) - after).max() < 8 / 255  # in steps of 1.4 degrees


def test_greys_have_no_hue_to_turn():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    assert np.array_equal(ColorChange(degrees=16).applied(grey), grey)


def test_gamma_is_a_power_of_the_pixels():
    pixels = noise((16, 16))
    expected = 255 * (pixels / 255) ** 0.95
    assert np.abs(ColorChange(gamma=0.95).applied(pixels) - expected).max() <= 0.5


def test_no_change_changes_nothing():
    pixels = noise((16, 16))
    assert np.array_equal(ColorChange().applied(pixels), pixels)
