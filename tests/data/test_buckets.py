"""Buckets: the sizes of sd-scripts, and promises for any image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.images.buckets import bucket_problems, bucket_sizes, place
from library.data.options import DatasetOptions

SDXL = {"resolution": 1024, "enable_bucket": True, "max_bucket_reso": 2048}
SIDES = st.integers(1, 6000)
WHERE = {key: key for key in ("resolution", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso")}


def test_there_are_41_buckets_at_1024():
    sizes = bucket_sizes((1024, 1024), 256, 2048, 64)
    assert len(sizes) == 41
    assert sizes == sorted(sizes)
    assert {(256, 2048), (1024, 1024), (2048, 256)} <= set(sizes)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1000, 1500), (832, 1216), (832, 1248)),
        ((640, 480), (1152, 896), (1195, 896)),
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((832, 1216), (832, 1216), (832, 1216)),
    ],
)
def test_an_image_goes_to_the_bucket_of_sd_scripts(size, bucket, resized):
    placed = place(size, DatasetOptions(**SDXL))
    assert (placed.bucket, placed.resized) == (bucket, resized)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [((640, 480), (640, 448), (640, 480)), ((1500, 1000), (1216, 832), (1248, 832)), ((2048, 2048), (1024, 1024), (1024, 1024))],
)
def test_without_upscale_the_bucket_follows_the_image(size, bucket, resized):
    placed = place(size, DatasetOptions(**SDXL, bucket_no_upscale=True))
    assert (placed.bucket, placed.resized) == (bucket, resized)


def test_a_tiny_image_is_enlarged_to_one_step():
    placed = place((40, 20), DatasetOptions(**SDXL, bucket_no_upscale=True))
    assert (placed.bucket, placed.resized) == ((128, 64), (128, 64))


def test_without_buckets_every_image_is_cropped_to_the_resolution():
    placed = place((1500, 1000), DatasetOptions(resolution=(1024, 768)))
    assert (placed.bucket, placed.resized, placed.centre) == ((1024, 768), (1152, 768), (64, 0))


@given(SIDES, SIDES, st.sampled_from([256, 512, 1024]), st.sampled_from([32, 64]), st.booleans())
def test_every_image_covers_its_bucket(width, height, resolution, step, no_upscale):
    options = DatasetOptions(
        resolution=resolution, enable_bucket=True, max_bucket_reso=2048, bucket_reso_steps=step, bucket_no_upscale=no_upscale
    )
    placed = place((width, height), options)
    assert min(placed.slack) >= 0
    assert all(side >= step and side % step == 0 for side in placed.bucket)
    assert placed.bucket[0] * placed.bucket[1] <= resolution**2


@given(SIDES, SIDES)
def test_without_upscale_only_sides_below_one_step_grow(width, height):
    placed = place((width, height), DatasetOptions(**SDXL, bucket_no_upscale=True))
    grows = placed.resized[0] > width or placed.resized[1] > height
    thin = min(width, height) < 64 or max(width, height) / min(width, height) > 1024**2 / 64**2
    assert not grows or thin


@given(st.integers(4, 40), st.integers(1, 8), st.integers(8, 64), st.sampled_from([32, 64]))
def test_buckets_stay_within_their_bounds(side, shortest, longest, step):
    for width, height in bucket_sizes((side * step, side * step), shortest * step, max(side, longest) * step, step):
        assert width * height <= (side * step) ** 2
        assert max(width, height) <= max(side, longest) * step
        assert width % step == height % step == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resolution": 1000}, "resolution: 1000x1000: the model needs multiples of 32; try 992x992"),
        (
            {"resolution": 1024, "enable_bucket": True, "bucket_reso_steps": 50},
            "bucket_reso_steps: 50: the model needs a multiple of 32; try 64",
        ),
        ({"resolution": 128, "enable_bucket": True}, "min_bucket_reso: 256 is more than the shorter side of the resolution 128x128"),
        (
            {"resolution": (1216, 832), "enable_bucket": True},
            "max_bucket_reso: 1024 is less than the longer side of the resolution 1216x832",
        ),
    ],
)
def test_sizes_that_the_model_cannot_take_are_refused(options, words):
    (problem,) = bucket_problems(DatasetOptions(**options), 32, WHERE)
    assert problem.startswith(words)


def test_bounds_do_not_matter_without_upscale():
    assert not bucket_problems(DatasetOptions(resolution=128, enable_bucket=True, bucket_no_upscale=True), 32, WHERE)
