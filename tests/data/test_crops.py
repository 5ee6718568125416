"""Crops: inside the image, at the centre, at random or around a face, and told to the model as they are."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.core.keyed_random import keyed_random
from library.data.images.buckets import Placement, cover
from library.data.images.crops import Crop, Face, centre_crop, drawn_crop, face_in_name
from library.data.options import SubsetOptions

Draws = Callable[[str], random.Random]
SIDES = st.integers(1, 3000)
SIZES = st.tuples(SIDES, SIDES).filter(lambda size: max(size) <= 8 * min(size))
BUCKETS = st.tuples(st.integers(1, 16), st.integers(1, 16)).map(lambda sides: (sides[0] * 64, sides[1] * 64))
RANGES = st.tuples(st.floats(0.2, 10), st.floats(0, 5)).map(lambda ends: (ends[0], ends[0] + ends[1]))
PLACEMENT = Placement((64, 64), (90, 64))


def options(**values) -> SubsetOptions:
    return SubsetOptions(image_dir=Path("pictures"), **values)


def draws(seed: int = 0, sample: int = 0) -> Draws:
    return lambda purpose: keyed_random(seed, purpose, sample)


def nothing_drawn(purpose: str) -> random.Random:
    raise AssertionError(f"{purpose} is drawn without being wanted")


@st.composite
def faces(draw, size: tuple[int, int]) -> Face:
    x, y = draw(st.integers(0, size[0])), draw(st.integers(0, size[1]))
    return Face(x, y, draw(st.integers(1, size[0])), draw(st.integers(1, size[1])))


def named(face: Face) -> Path:
    return Path(f"a_{face.x}_{face.y}_{face.width}_{face.height}.png")


def is_inside(crop: Crop) -> bool:
    spans = zip(crop.corner, crop.size, crop.resized, strict=True)
    return all(start >= 0 and start + side <= length for start, side, length in spans)


# Without a face


def test_the_centre_is_cropped_without_a_draw():
    assert drawn_crop(Path("a.png"), (900, 640), PLACEMENT, options(), nothing_drawn) == Crop((90, 64), (13, 0), (64, 64))
    assert centre_crop(PLACEMENT) == Crop((90, 64), (13, 0), (64, 64))


def test_a_mirrored_crop_is_counted_in_the_mirrored_image():
    assert Crop((90, 70), (5, 2), (64, 64)).conditioning == (2, 5)
    assert Crop((90, 70), (5, 2), (64, 64), flipped=True).conditioning == (2, 90 - 64 - 5)


def test_half_of_the_uses_are_mirrored():
    flips = [drawn_crop(Path("a.png"), (90, 64), PLACEMENT, options(flip_aug=True), draws(0, n)).flipped for n in range(1000)]
    assert 450 < sum(flips) < 550


def test_random_crops_reach_every_place():
    placement = Placement((64, 64), (66, 65))
    crops = [drawn_crop(Path("a.png"), (66, 65), placement, options(random_crop=True), draws(0, n)) for n in range(200)]
    assert {crop.corner for crop in crops} == {(left, top) for left in range(3) for top in range(2)}


@given(SIZES, BUCKETS, st.integers(0, 99))
def test_random_crops_are_inside_of_the_image(size, bucket, seed):
    crop = drawn_crop(Path("a.png"), size, cover(size, bucket), options(random_crop=True), draws(seed))
    assert is_inside(crop)
    assert (crop.size, crop.resized) == (bucket, cover(size, bucket).resized)


def test_flips_and_crops_are_drawn_apart():
    with_flips = options(random_crop=True, flip_aug=True)
    for sample in range(20):
        plain = drawn_crop(Path("a.png"), (90, 64), PLACEMENT, options(random_crop=True), draws(0, sample))
        assert drawn_crop(Path("a.png"), (90, 64), PLACEMENT, with_flips, draws(0, sample)).corner == plain.corner


# The face in the name


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_10_20_30_40.png", Face(10, 20, 30, 40)),
        ("a_b_1_10_20_30_40.webp", Face(10, 20, 30, 40)),
        ("a.png", None),
        ("a_10_20_30.png", None),
        ("a_10_20_30_4x.png", None),
        ("a_10_-2_30_40.png", None),
        ("a_10_20_0_0.png", None),
        ("photo_2024_10_12_1530.png", None),  # a date, which is no place in this image
    ],
)
def test_a_face_is_four_numbers_within_the_image(name, face):
    assert face_in_name(Path(name), (100, 80)) == face


def test_without_a_face_in_the_name_the_crop_is_as_usual():
    zoom = options(face_crop_aug_range=(2.0, 4.0), random_crop=True)
    expected = drawn_crop(Path("a.png"), (90, 64), PLACEMENT, options(random_crop=True), draws())
    assert drawn_crop(Path("a.png"), (90, 64), PLACEMENT, zoom, draws()) == expected


def test_a_name_with_a_face_is_nothing_special_without_the_option():
    assert drawn_crop(Path("a_10_20_30_40.png"), (90, 64), PLACEMENT, options(), nothing_drawn) == centre_crop(PLACEMENT)


# Around a face


@given(st.data(), SIZES, BUCKETS, RANGES, st.booleans(), st.integers(0, 99))
def test_face_crops_are_inside_of_the_image_and_keep_its_ratio(data, size, bucket, zoom, at_random, seed):
    face = data.draw(faces(size))
    given_options = options(face_crop_aug_range=zoom, random_crop=at_random)
    crop = drawn_crop(named(face), size, cover(size, bucket), given_options, draws(seed))
    assert is_inside(crop)
    assert crop.size == bucket
    scales = [length / side for length, side in zip(crop.resized, size, strict=True)]
    assert abs(scales[0] - scales[1]) <= 1 / min(size)


@given(st.integers(1000, 3000), st.integers(1000, 3000), st.integers(1, 400), st.floats(0.52, 1), st.floats(0.52, 1), st.integers(0, 99))
def test_the_shorter_side_is_as_many_faces_as_asked_where_the_image_allows_it(width, height, face, one_scale, other_scale, seed):
    smallest, largest = sorted((one_scale, other_scale))  # above 0.512, which covers the bucket
    zoom = options(face_crop_aug_range=(512 / (face * largest), 512 / (face * smallest)))
    size, path = (width, height), named(Face(500, 500, face, 1))
    crop = drawn_crop(path, size, cover(size, (512, 512)), zoom, draws(seed))
    for side, length in zip(size, crop.resized, strict=True):
        assert side * smallest - 0.5 - 1e-6 <= length <= side * largest + 0.5 + 1e-6


@given(st.data(), SIZES, BUCKETS, RANGES, st.integers(0, 99))
def test_a_face_crop_enlarges_no_more_than_it_must(data, size, bucket, zoom, seed):
    face = data.draw(faces(size))
    crop = drawn_crop(named(face), size, cover(size, bucket), options(face_crop_aug_range=zoom), draws(seed))
    most = max(1.0, bucket[0] / size[0], bucket[1] / size[1])
    assert all(length <= side * most + 0.5 + 1e-6 for length, side in zip(crop.resized, size, strict=True))


def test_a_fixed_range_puts_the_middle_of_the_face_in_the_middle():
    crop = drawn_crop(
        Path("a_1000_600_256_200.png"), (2000, 1500), cover((2000, 1500), (512, 512)), options(face_crop_aug_range=(2, 2)), draws()
    )
    assert crop == Crop((2000, 1500), (1000 - 256, 600 - 256), (512, 512))


def test_a_face_at_the_edge_is_cropped_at_the_edge():
    crop = drawn_crop(
        Path("a_1990_5_256_200.png"), (2000, 1500), cover((2000, 1500), (512, 512)), options(face_crop_aug_range=(2, 2)), draws()
    )
    assert crop.corner == (2000 - 512, 0)


def test_a_range_moves_the_face_by_at_most_a_twentieth_of_its_size():
    face, size = Face(1000, 700, 300, 200), (2000, 1500)
    moved = set()
    for sample in range(300):
        crop = drawn_crop(named(face), size, cover(size, (512, 512)), options(face_crop_aug_range=(2, 4)), draws(0, sample))
        scale = crop.resized[0] / size[0]
        off = [start + 256 - middle * scale for start, middle in zip(crop.corner, (face.x, face.y), strict=True)]
        assert all(abs(each) <= 300 * scale / 20 + 1 for each in off)
        moved.add(crop.corner)
    assert len(moved) > 100


def test_a_random_face_crop_is_nearest_to_the_face_most_often():
    face, size = Face(1000, 700, 300, 200), (2000, 1500)
    zoom = options(face_crop_aug_range=(1.5, 1.5), random_crop=True)
    crops = [drawn_crop(named(face), size, cover(size, (512, 512)), zoom, draws(0, n)) for n in range(500)]
    off = [abs(crop.corner[0] + 256 - face.x) for crop in crops]
    assert sum(each < 250 for each in off) > sum(250 <= each < 500 for each in off) > sum(each >= 750 for each in off)
    assert max(off) > 500
