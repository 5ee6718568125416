"""Colour profiles: what the image looks like is kept, not its numbers."""

from pathlib import Path

import numpy as np
import pytest
from color_profile_samples import ADOBE_RGB, SRGB, black_ink_profile, grey_profile, matrix_profile
from dataset_samples import noise
from PIL import Image, ImageCms

from library.data.images.files import read_layers, read_mask, read_rgb
from library.data.images.profiles import in_srgb

SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ADOBE_PROFILE = matrix_profile(ADOBE_RGB, 563 / 256)
PATH = Path("a.png")


def as_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light (0 to 1) as numbers of sRGB (0 to 255), by IEC 61966-2-1."""
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_a_wide_gamut_image_is_converted_by_its_matrix():
    pixels = noise((16, 16)) // 4 + 96  # inside of sRGB
    light = (pixels / 255) ** (563 / 256) @ np.array(ADOBE_RGB) @ np.linalg.inv(np.array(SRGB))
    converted = np.asarray(in_srgb(Image.fromarray(pixels), ADOBE_PROFILE, PATH))
    assert np.abs(converted - as_srgb(light)).max() <= 1.5
    assert np.abs(converted.astype(int) - pixels).max() >= 8


@pytest.mark.parametrize("gamma", [1.8, 2.2])
def test_a_grey_image_is_converted_by_its_curve(gamma):
    grey = np.arange(256, dtype=np.uint8)[None]
    converted = np.asarray(in_srgb(Image.fromarray(grey), grey_profile(gamma), PATH))
    assert np.abs(converted - as_srgb((grey / 255) ** gamma)[..., None]).max() <= 1.5


def test_a_cmyk_image_is_converted_by_its_inks(tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, :8] = (255, 0, 255, 0)  # no ink of this press
    inks[:, 8:] = (0, 0, 0, 255)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100, icc_profile=black_ink_profile())
    pixels = np.asarray(read_rgb(tmp_path / "a.jpg"))
    assert pixels[:, 0].min() >= 253
    assert pixels[:, -1].max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA", "1"])
def test_an_srgb_profile_changes_no_bit(tmp_path, mode):
    image = Image.fromarray(noise((16, 16), channels=4)).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=SRGB_PROFILE)
    image.save(tmp_path / "b.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), np.asarray(read_rgb(tmp_path / "b.png")))


def test_transparency_is_no_colour(tmp_path):
    pixels = noise((16, 16), channels=4)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=ADOBE_PROFILE)
    layers = read_layers(tmp_path / "a.png")
    assert np.array_equal(np.asarray(layers.alpha), pixels[..., 3])
    assert np.array_equal(np.asarray(layers.rgb), np.asarray(in_srgb(Image.fromarray(pixels[..., :3]), ADOBE_PROFILE, PATH)))


def test_a_palette_is_converted(tmp_path):
    image = Image.fromarray(noise((16, 16))).quantize(8)
    image.save(tmp_path / "a.png", icc_profile=ADOBE_PROFILE)
    expected = in_srgb(image.convert("RGB"), ADOBE_PROFILE, PATH)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), np.asarray(expected))


def test_a_16_bit_grey_image_is_converted(tmp_path):
    Image.fromarray(np.full((2, 2), 257 * 64, np.uint16)).save(tmp_path / "a.png", icc_profile=grey_profile(1.8))
    assert abs(int(np.asarray(read_rgb(tmp_path / "a.png"))[0, 0, 0]) - as_srgb(np.array((64 / 255) ** 1.8))) <= 1.5


@pytest.mark.parametrize(
    ("profile", "reason"),
    [(b"no profile at all", "it is for"), (ADOBE_PROFILE[:200], "cannot open"), (grey_profile(1.0), "b'GRAY', the image is RGB")],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_named_once(tmp_path, caplog, profile, reason):
    path = tmp_path / "broken.png"
    Image.fromarray(noise((8, 8))).save(path, icc_profile=profile)
    for _ in range(2):
        assert np.array_equal(np.asarray(read_rgb(path)), noise((8, 8)))
    assert len(caplog.records) == 1
    assert "broken.png: its colour profile is ignored" in caplog.text
    assert reason in caplog.text


def test_a_mask_is_numbers_whatever_its_profile(tmp_path):
    pixels = noise((8, 8))
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=ADOBE_PROFILE)
    assert np.array_equal(np.asarray(read_mask(tmp_path / "a.png")), pixels[..., 0])
