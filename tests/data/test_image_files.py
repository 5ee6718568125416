"""Image files: every kind becomes upright RGB, and a broken one is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_samples import noise
from PIL import Image

from library.data.buckets import Placement
from library.data.images import files_in, load_pixels, read_rgb, read_size, resize


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise((40, 20))).save(path, exif=exif)
    assert read_size(path) == read_rgb(path).size == ((40, 20) if orientation < 5 else (20, 40))


def test_a_picture_turned_by_the_camera_is_turned_back(tmp_path):
    upright = noise((40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stored it turned by 90 degrees against the clock
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), upright)


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    flat = np.asarray(read_rgb(tmp_path / "a.png"))
    assert flat[0, 0].tolist() == [10, 20, 30]
    assert flat[1, 1].tolist() == [255, 255, 255]


def test_a_transparent_palette_colour_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 90, 90, 90])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(read_rgb(tmp_path / "a.png")).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.asarray(read_rgb(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(noise((8, 8))).convert(mode).save(path)
    assert read_rgb(path).mode == "RGB"


def test_bmp_is_read(tmp_path):
    Image.fromarray(noise((8, 8))).save(tmp_path / "a.bmp")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.bmp")), noise((8, 8)))


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.png: cannot be read \(not an image\)"):
        read_size(tmp_path / "a.png")


def test_a_truncated_image_is_named_when_decoded(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise((64, 64))).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    assert read_size(path) == (64, 64)
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read"):
        read_rgb(path)


def share_matrix(length: int, count: int) -> np.ndarray:
    """(count, length): the share of each input pixel in each output pixel, written from the definition of area averaging."""
    edges = np.arange(count + 1) * length / count
    inside = np.minimum(edges[1:, None], np.arange(length) + 1) - np.maximum(edges[:-1, None], np.arange(length))
    return inside.clip(0) * count / length


@pytest.mark.parametrize(("width", "height"), [(20, 11), (52, 36), (1, 1), (30, 36)])
def test_shrinking_averages_by_area(width, height):
    pixels = noise((53, 37))
    means = np.einsum("ih,hwc,jw->ijc", share_matrix(37, height), pixels.astype(float), share_matrix(53, width))
    assert np.abs(resize(pixels, (width, height)) - means).max() <= 0.51


def test_growing_is_lanczos():
    pixels = noise((16, 16))
    wanted = Image.fromarray(pixels).resize((40, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(resize(pixels, (40, 24)), np.asarray(wanted))


def test_pixels_are_cropped_then_mirrored(tmp_path):
    pixels = noise((10, 8))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_pixels(tmp_path / "a.png", Placement((4, 8), (10, 8)), (1, 0), True)
    expected = torch.from_numpy(pixels[:, 1:5][:, ::-1].copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert loaded.shape == (3, 8, 4)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, expected)


def test_files_are_found_in_any_case_and_in_order(tmp_path: Path):
    for name in ("b.PNG", "a.jpeg", "c.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in files_in(tmp_path)] == ["a.jpeg", "b.PNG"]


def test_damaged_exif_turns_nothing(tmp_path):
    Image.fromarray(noise((40, 20))).save(tmp_path / "a.jpg", exif=b"Exif\0\0no header of a TIFF file")
    assert read_size(tmp_path / "a.jpg") == read_rgb(tmp_path / "a.jpg").size == (40, 20)
