"""Aspect-ratio buckets: the sizes there are, which one an image goes to, and how it is resized and cropped for it.

The rules are those of sd-scripts (its `BucketManager`), number for number; where an image would get a bucket of zero size
there (smaller than one step, with `bucket_no_upscale`), it is enlarged to one step here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from library.data.options import DatasetOptions, Size


@dataclass(frozen=True)
class Placement:
    """Where an image goes: resize to `resized`, which covers the bucket, then crop to `bucket`. Sizes are (width, height)."""

    bucket: Size
    resized: Size

    @property
    def slack(self) -> Size:
        """How many columns and rows the crop loses."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]

    @property
    def centre(self) -> tuple[int, int]:
        """Left and top of the centre crop."""
        return self.slack[0] // 2, self.slack[1] // 2


def bucket_sizes(resolution: Size, shortest: int, longest: int, step: int) -> list[Size]:
    """The buckets of about the area of `resolution` with sides in `shortest`..`longest`, multiples of `step`, ascending."""
    area = resolution[0] * resolution[1]
    shortest, longest = max(step, floor_to(shortest, step)), ceil_to(longest, step)
    square = floor_to(math.isqrt(area), step)
    sizes = {(square, square)} if square else set()
    for width in range(shortest, longest + 1, step):
        height = min(longest, floor_to(area // width, step))
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


@lru_cache(maxsize=65536)
def place(size: Size, options: DatasetOptions) -> Placement:
    """The bucket of an image of `size`, and its size before the crop; one object for all images of a size."""
    if not options.enable_bucket:
        return cover(size, options.size)
    if options.bucket_no_upscale:
        return place_without_upscale(size, options.size[0] * options.size[1], options.bucket_reso_steps)
    return cover(size, nearest_bucket(size, sizes_of(options)))


def sizes_of(options: DatasetOptions) -> list[Size]:
    """The buckets that a dataset's options describe."""
    return bucket_sizes(options.size, options.min_bucket_reso, options.max_bucket_reso, options.bucket_reso_steps)


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The image's own size if it is a bucket, else the bucket with the nearest ratio (the first of equals)."""
    ratio = size[0] / size[1]
    return size if size in buckets else min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def cover(size: Size, bucket: Size) -> Placement:
    """Scale an image so that it just covers the bucket."""
    wider = size[0] / size[1] > bucket[0] / bucket[1]
    scale = bucket[1] / size[1] if wider else bucket[0] / size[0]
    return Placement(bucket, (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)))


def place_without_upscale(size: Size, area: int, step: int) -> Placement:
    """A bucket made for the image: shrunk to `area` if larger, its sides floored to `step`, never less than one step.

    An image with a side below `step` is the one case that is enlarged; its long side is then cropped to keep the area.
    """
    resized = _shrink(size, area, step) if size[0] * size[1] > area else size
    shorter = min(resized)
    if shorter < step:
        resized = (int(resized[0] * step / shorter + 0.5), int(resized[1] * step / shorter + 0.5))
    bucket = floor_to(resized[0], step), floor_to(resized[1], step)
    most = max(step, floor_to(area // min(bucket), step))
    return Placement((min(bucket[0], most), min(bucket[1], most)) if shorter < step else bucket, resized)


def bucket_problems(options: DatasetOptions, resolution_step: int, where: Mapping[str, str]) -> list[str]:
    """What a model with sides in multiples of `resolution_step` cannot take; `where` names the place each key was given at."""
    problems = []
    width, height = options.size
    if width % resolution_step or height % resolution_step:
        near = f"{round_to(width, resolution_step)}x{round_to(height, resolution_step)}"
        problems.append(f"{where['resolution']}: {width}x{height}: the model needs multiples of {resolution_step}; try {near}")
    if not options.enable_bucket:
        return problems
    step = options.bucket_reso_steps
    if step % resolution_step:
        near = round_to(step, resolution_step)
        problems.append(f"{where['bucket_reso_steps']}: {step}: the model needs a multiple of {resolution_step}; try {near}")
    if options.bucket_no_upscale:
        if min(width, height) < step:
            problems.append(
                f"{where['bucket_reso_steps']}: {step} is more than the resolution {width}x{height}; lower it to {resolution_step}"
            )
        return problems
    if floor_to(options.min_bucket_reso, step) > min(width, height):
        short = f"{options.min_bucket_reso} is more than the shorter side of the resolution {width}x{height}"
        problems.append(f"{where['min_bucket_reso']}: {short}; lower it to {min(width, height)} or less")
    if ceil_to(options.max_bucket_reso, step) < max(width, height):
        long = f"{options.max_bucket_reso} is less than the longer side of the resolution {width}x{height}"
        problems.append(f"{where['max_bucket_reso']}: {long}; raise it to {max(width, height)} or more")
    if not problems and not sizes_of(options):
        problems.append(f"{where['bucket_reso_steps']}: no bucket of {width}x{height} has sides in multiples of {step}; lower it")
    return problems


def floor_to(number: int, step: int) -> int:
    """The multiple of `step` at or below `number`."""
    return number // step * step


def ceil_to(number: int, step: int) -> int:
    """The multiple of `step` at or above `number`."""
    return -(-number // step) * step


def round_to(number: int, step: int) -> int:
    """The positive multiple of `step` nearest to `number`."""
    return max(step, int(number / step + 0.5) * step)


# Shrinking to an area


def _shrink(size: Size, area: int, step: int) -> Size:
    """The size of about `area` pixels of which one side is a multiple of `step`: the side that keeps the ratio better."""
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    by_width = floor_to(int(width + 0.5), step)
    by_height = floor_to(int(area / width + 0.5), step)
    width_error = _ratio_error(by_width, floor_to(int(by_width / ratio + 0.5), step), ratio)
    height_error = _ratio_error(floor_to(int(by_height * ratio + 0.5), step), by_height, ratio)
    if width_error < height_error:
        return by_width, max(1, int(by_width / ratio + 0.5))
    if height_error < math.inf:
        return int(by_height * ratio + 0.5), by_height
    return max(1, int(width + 0.5)), max(1, int(area / width + 0.5))  # thinner than one step either way


def _ratio_error(width: int, height: int, ratio: float) -> float:
    return abs(width / height - ratio) if width and height else math.inf
