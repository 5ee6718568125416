"""Pictures: pixels and masks go through the same resizing, crop and mirror."""

import numpy as np
import pytest
import torch
from dataset_samples import noise
from PIL import Image

from library.data.images.colors import ColorChange
from library.data.images.crops import Crop
from library.data.images.files import read_rgb
from library.data.images.pictures import load_picture
from library.data.images.resizing import resize

WHOLE = Crop((10, 8), (0, 0), (10, 8))
PART = Crop((10, 8), (1, 0), (4, 8), flipped=True)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise((10, 8))).save(path)
    return path


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    """The pixels of a picture as (height, width, 3) uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_pixels_are_cropped_then_mirrored(image):
    picture = load_picture(image, PART)
    expected = torch.from_numpy(noise((10, 8))[:, 1:5][:, ::-1].copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert picture.pixels.dtype == torch.float32
    assert picture.pixels.is_contiguous()
    torch.testing.assert_close(picture.pixels, expected)
    assert picture.mask is None


@pytest.mark.parametrize("interpolation", [None, "nearest", "bicubic", "area"])
def test_the_image_is_resized_as_asked(image, interpolation):
    crop = Crop((20, 16), (3, 2), (16, 8))
    expected = resize(read_rgb(image), (20, 16), interpolation)[2:10, 3:19]
    assert np.array_equal(as_bytes(load_picture(image, crop, interpolation=interpolation).pixels), expected)


def test_colours_are_changed_after_the_crop(image):
    change = ColorChange(gamma=1.05)
    expected = change.applied(noise((10, 8))[:, 1:5])[:, ::-1]
    assert np.array_equal(as_bytes(load_picture(image, PART, color=change).pixels), expected)


# Masks


def test_alpha_is_the_mask_and_the_colours_below_it_stay(tmp_path):
    pixels = noise((10, 8), channels=4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", PART, alpha=True)
    assert picture.mask is not None
    assert np.array_equal(as_bytes(picture.pixels), pixels[:, 1:5, :3][:, ::-1])
    torch.testing.assert_close(picture.mask, torch.from_numpy(pixels[:, 1:5, 3][:, ::-1].copy()).float() / 255)


def test_all_counts_where_an_image_has_no_alpha(image):
    mask = load_picture(image, PART, alpha=True).mask
    assert mask is not None
    assert torch.equal(mask, torch.ones(8, 4))


def test_alpha_lies_on_white_where_it_is_not_the_mask(tmp_path):
    pixels = np.zeros((8, 10, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", WHOLE)
    assert picture.mask is None
    assert picture.pixels.min() == 1


def test_the_mask_goes_the_way_of_the_image(tmp_path, image):
    marks = np.zeros((80, 100, 3), np.uint8)  # ten times the image
    marks[30:40, 20:30] = 255
    Image.fromarray(marks).save(tmp_path / "mask.png")
    mask = load_picture(image, PART, mask=tmp_path / "mask.png").mask
    expected = torch.zeros(8, 10)
    expected[3, 2] = 1
    assert mask is not None
    assert torch.equal(mask, expected[:, 1:5].flip(1))


@pytest.mark.parametrize("size", [(5, 4), (10, 8), (40, 32)])
def test_a_mask_of_any_size_stays_between_0_and_1(tmp_path, image, size):
    marks = (noise(size, channels=1)[..., 0] > 127).astype(np.uint8) * 255
    Image.fromarray(marks).save(tmp_path / "mask.png")
    mask = load_picture(image, Crop((20, 16), (2, 0), (16, 16)), mask=tmp_path / "mask.png").mask
    assert mask is not None
    assert mask.shape == (16, 16)
    assert mask.dtype == torch.float32
    assert 0 <= mask.min() < mask.max() <= 1


def test_of_a_mask_image_and_alpha_what_both_let_through_counts(tmp_path):
    pixels, marks = noise((10, 8), channels=4), noise((10, 8), 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(marks).save(tmp_path / "mask.png")
    mask = load_picture(tmp_path / "a.png", WHOLE, alpha=True, mask=tmp_path / "mask.png").mask
    torch.testing.assert_close(mask, torch.from_numpy(pixels[..., 3] / 255 * marks[..., 0] / 255).float())


def test_a_mask_of_another_shape_is_named_with_both_sizes(tmp_path, image):
    Image.fromarray(noise((8, 8))).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png: the mask is 8x8, and .*a\.png is 10x8"):
        load_picture(image, WHOLE, mask=tmp_path / "mask.png")


def test_a_mask_is_upright_as_its_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(noise((10, 8))).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.png", exif=exif)
    Image.fromarray(noise((10, 8))).save(tmp_path / "mask.png")
    mask = load_picture(tmp_path / "a.png", WHOLE, mask=tmp_path / "mask.png").mask
    torch.testing.assert_close(mask, torch.from_numpy(noise((10, 8))[..., 0]).float() / 255)


# Refused


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise((64, 64))).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read"):
        load_picture(path, Crop((64, 64), (0, 0), (64, 64)))


def test_a_sliver_is_not_enlarged_beyond_any_memory(tmp_path):
    Image.new("RGB", (1, 400)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: would be 1024x409600 to cover its bucket"):
        load_picture(tmp_path / "a.png", Crop((1024, 409600), (0, 0), (1024, 1024)))
