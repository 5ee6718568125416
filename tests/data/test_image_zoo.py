"""A zoo of odd images: each becomes upright 8-bit RGB in a way that is written here."""

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import noise
from PIL import Image

from library.data.images.files import read_layers, read_mask, read_rgb, read_size


def shown(path: Path) -> list:
    """The pixels of an image of one row."""
    return np.asarray(read_rgb(path))[0].tolist()


def png(path: Path, rows: np.ndarray, color: int, *, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Write a 16-bit PNG, which Pillow does for grey only. `rows` are (height, width, channels) uint16; `color` is PNG's colour type."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    parts = [chunk(b"IHDR", header), *itertools.starmap(chunk, chunks), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (1, 50)])
def test_every_mode_and_size_becomes_rgb(tmp_path, mode, size):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(noise(size)).convert(mode).save(path)
    assert read_rgb(path).mode == "RGB"
    assert read_rgb(path).size == read_size(path) == size


def test_a_picture_turned_by_the_camera_is_turned_back_with_its_transparency(tmp_path):
    upright = noise((40, 20), channels=4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stored it turned by 90 degrees against the clock
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    layers = read_layers(tmp_path / "a.png")
    assert layers.alpha is not None
    assert np.array_equal(np.asarray(layers.rgb), upright[..., :3])
    assert np.array_equal(np.asarray(layers.alpha), upright[..., 3])


def test_transparency_lies_on_white(tmp_path):
    pixels = np.array([[(10, 20, 30, 255), (0, 0, 0, 0), (255, 0, 0, 127)]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png") == [[10, 20, 30], [255, 255, 255], [255, 128, 128]]


def test_colours_below_transparency_are_kept_apart(tmp_path):
    pixels = noise((8, 8), channels=4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    layers = read_layers(tmp_path / "a.png")
    assert np.array_equal(np.dstack([np.asarray(layers.rgb), np.asarray(layers.alpha)]), pixels)


def test_an_image_without_transparency_has_none(tmp_path):
    Image.fromarray(noise((8, 8))).save(tmp_path / "a.png")
    assert read_layers(tmp_path / "a.png").alpha is None


def test_a_transparent_palette_colour_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 90, 90, 90])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert shown(tmp_path / "a.png") == [[1, 2, 3], [255, 255, 255]]


def test_a_half_transparent_palette_colour_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 255, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=bytes([255, 127]))
    assert shown(tmp_path / "a.png") == [[1, 2, 3], [255, 128, 128]]


@pytest.mark.parametrize(("mode", "key", "color"), [("RGB", (9, 8, 7), (9, 8, 7)), ("L", 9, 9)])
def test_a_colour_that_stands_for_transparency_lies_on_white(tmp_path, mode, key, color):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), color)
    image.save(tmp_path / "a.png", transparency=key)
    assert shown(tmp_path / "a.png") == [[0, 0, 0], [255, 255, 255]]


def test_grey_with_transparency_lies_on_white(tmp_path):
    Image.fromarray(np.array([[(40, 255), (40, 0)]], np.uint8), "LA").save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png") == [[40] * 3, [255] * 3]


def test_black_and_white_is_0_and_255(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png") == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("values", [[0, 257 * 100, 65535], [0, 100, 257]])  # the second is nearly black, and stays so
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, values):
    Image.fromarray(np.array([values], np.uint16)).save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png") == [[round(value / 257)] * 3 for value in values]


def test_16_bit_colours_are_scaled(tmp_path):
    png(tmp_path / "a.png", np.array([[(0, 257 * 100, 65535)]], np.uint16), 2)
    assert shown(tmp_path / "a.png") == [[0, 100, 255]]


def test_16_bit_colours_with_transparency_lie_on_white(tmp_path):
    png(tmp_path / "a.png", np.array([[(257 * 10, 257 * 20, 257 * 30, 65535), (0, 0, 0, 0)]], np.uint16), 6)
    assert shown(tmp_path / "a.png") == [[10, 20, 30], [255, 255, 255]]


def test_16_bit_grey_with_transparency_lies_on_white(tmp_path):
    png(tmp_path / "a.png", np.array([[(257 * 10, 65535), (0, 0)]], np.uint16), 4)
    assert shown(tmp_path / "a.png") == [[10] * 3, [255] * 3]


def test_a_16_bit_grey_that_stands_for_transparency_lies_on_white(tmp_path):
    png(tmp_path / "a.png", np.array([[[257 * 10], [257 * 99]]], np.uint16), 0, chunks=((b"tRNS", struct.pack(">H", 257 * 99)),))
    assert shown(tmp_path / "a.png") == [[10] * 3, [255] * 3]


def test_a_cmyk_jpeg_as_adobe_writes_it_is_not_inverted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(read_rgb(tmp_path / "a.jpg")).astype(int) - (255, 0, 0)).max() <= 2


def test_bmp_is_read(tmp_path):
    Image.fromarray(noise((8, 8))).save(tmp_path / "a.bmp")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.bmp")), noise((8, 8)))


def test_a_file_with_the_ending_of_another_kind_is_read(tmp_path):
    Image.fromarray(noise((8, 8))).save(tmp_path / "a.jpg", "png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.jpg")), noise((8, 8)))


def test_a_mask_counts_where_it_is_red_and_opaque(tmp_path):
    pixels = np.array([[(255, 0, 0, 255), (255, 255, 255, 0), (0, 255, 255, 255), (255, 9, 9, 51)]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.asarray(read_mask(tmp_path / "a.png")).tolist() == [[255, 0, 0, 51]]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_a_mask_of_any_mode_is_0_to_255(tmp_path, mode):
    stored = (
        Image.fromarray(np.array([[0, 65535]], np.uint16))
        if mode == "I;16"
        else Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    )
    stored.save(tmp_path / "a.png")
    assert np.asarray(read_mask(tmp_path / "a.png")).tolist() == [[0, 255]]
