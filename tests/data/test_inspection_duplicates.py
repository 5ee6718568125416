"""Fingerprints and groups: copies are found however they were made, different pictures are not, and in seconds."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from library.data.inspection.duplicates import BLOCK, NEAR_BITS, Group, Prints, crossing_pairs, near_groups, same_groups
from library.data.inspection.fingerprints import Fingerprint, fingerprint


def scene(seed: int, size: tuple[int, int] = (240, 160)) -> Image.Image:
    """A smooth picture with contrast: a few random tones, enlarged."""
    tones = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(tones).resize(size, Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int = 40) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "smaller": lambda image: image.resize((90, 60), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((500, 333), Image.Resampling.BILINEAR),
    "recompressed": as_jpeg,
    "a little brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.06),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored and recompressed": lambda image: as_jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "a mark in a corner": lambda image: (image.paste("white", (0, 0, 10, 6)), image)[1],
}


def groups_of(images: list[Image.Image]) -> list[tuple[int, ...]]:
    return [group.members for group in near_groups(Prints([fingerprint(image) for image in images]))]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_looks_alike(change):
    for seed in range(8):
        assert groups_of([scene(seed), CHANGES[change](scene(seed))]) == [(0, 1)]


def test_different_pictures_do_not_look_alike():
    assert groups_of([scene(seed) for seed in range(60)]) == []


def test_flat_pictures_are_told_apart_by_their_colour():
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "red", "white")]
    assert groups_of(flat) == [(0, 2)]


def test_the_same_lines_in_other_colours_are_another_picture():
    red, blue = (
        Image.merge("RGB", [scene(3).convert("L") if band == own else Image.new("L", (240, 160), 90) for band in "RGB"]) for own in "RB"
    )
    assert groups_of([red, blue]) == []


def random_prints(count: int, copies: list[tuple[int, int]], seed: int) -> list[Fingerprint]:
    """Random fingerprints; each pair of `copies` makes the second one like the first but for a few bits."""
    draw = np.random.default_rng(seed)
    prints = [
        Fingerprint(int(draw.integers(2**63)), int(draw.integers(2**63)), draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for _ in range(count)
    ]
    for first, second in copies:
        flips = sum(1 << int(bit) for bit in draw.choice(63, NEAR_BITS, replace=False))
        prints[second] = Fingerprint(prints[first].bits ^ flips, prints[second].mirrored, prints[first].patch)
    return prints


@settings(max_examples=10)
@given(pairs=st.lists(st.tuples(st.integers(0, BLOCK), st.integers(BLOCK + 1, 2 * BLOCK)), max_size=4, unique_by=lambda pair: pair[1]))
def test_groups_are_the_same_whichever_block_a_copy_stands_in(pairs):
    wanted: dict[int, set[int]] = {}
    for first, second in pairs:
        wanted.setdefault(first, {first}).add(second)
    found = near_groups(Prints(random_prints(2 * BLOCK + 1, pairs, seed=1)))
    assert sorted(group.members for group in found) == sorted(tuple(sorted(group)) for group in wanted.values())


def test_a_chain_of_copies_is_one_group():
    prints = random_prints(3 * BLOCK, [(5, BLOCK + 5), (BLOCK + 5, 2 * BLOCK + 5)], seed=2)
    assert near_groups(Prints(prints)) == [Group((5, BLOCK + 5, 2 * BLOCK + 5))]


def test_equal_hashes_are_one_group():
    assert same_groups(["a", "b", "a", "c", "b", "a"]) == [Group((0, 2, 5)), Group((1, 4))]


def test_pairs_across_a_border_look_alike_directly():
    prints = Prints(random_prints(6, [(0, 1), (1, 2)], seed=3))
    (group,) = near_groups(prints)
    assert crossing_pairs(prints, group, {0}) == [(0, 1)]  # 2 is like 1, but not like 0
    assert crossing_pairs(prints, group, set()) == []


def test_across_a_border_each_picture_is_named_with_one_other_however_many_there_are():
    prints = Prints([fingerprint(scene(1))] * (2 * BLOCK))
    inside = set(range(BLOCK))
    assert crossing_pairs(prints, Group(tuple(range(2 * BLOCK))), inside) == [(one, BLOCK) for one in range(BLOCK)]


def test_no_pictures_have_no_groups():
    assert near_groups(Prints([])) == []
