"""Crops: how an image is resized, cropped and mirrored at one use, at the centre, at random or around a face."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from library.data.images.buckets import Placement
from library.data.options import Size, SubsetOptions

FACE_IN_NAME = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")
"""The end of a file's stem that tells of a face: its middle (x, y), width and height, in pixels."""


@dataclass(frozen=True, slots=True)
class Crop:
    """How an image is made to fit its bucket at one use: resized, cropped, then mirrored. Sizes are (width, height)."""

    resized: Size
    corner: tuple[int, int]  # left and top of the crop in the resized image, before mirroring
    size: Size  # of the crop: the bucket
    flipped: bool = False

    @property
    def conditioning(self) -> tuple[int, int]:
        """Top and left of the crop as the model is told: counted in the mirrored image where it is mirrored."""
        left, top = self.corner
        return top, self.resized[0] - self.size[0] - left if self.flipped else left


class Face(NamedTuple):
    """A face in an upright image, in its pixels: the middle of the face and its size."""

    x: int
    y: int
    width: int
    height: int


def centre_crop(placement: Placement, flipped: bool = False) -> Crop:
    """The crop that loses as much on one side as on the other."""
    return Crop(placement.resized, placement.centre, placement.bucket, flipped)


def drawn_crop(path: Path, size: Size, placement: Placement, options: SubsetOptions, draws: Callable[[str], random.Random]) -> Crop:
    """The crop of one use of an image of `size` (upright): as the options say, and as `draws(purpose)` has it.

    The purposes are "flip", "crop" and "face"; a generator is asked for only where its purpose is wanted.
    """
    flipped = options.flip_aug and draws("flip").random() < 0.5
    face = face_in_name(path, size) if options.face_crop_aug_range else None
    if face is not None:
        return _face_crop(face, size, placement.bucket, options, draws("face"), flipped)
    if not options.random_crop:
        return centre_crop(placement, flipped)
    draw = draws("crop")
    corner = draw.randint(0, placement.slack[0]), draw.randint(0, placement.slack[1])
    return Crop(placement.resized, corner, placement.bucket, flipped)


def face_in_name(path: Path, size: Size) -> Face | None:
    """The face that the file name tells of, `<name>_<middle x>_<middle y>_<width>_<height>.png`, where it lies in the image."""
    fields = FACE_IN_NAME.search(path.stem)
    if fields is None:
        return None
    face = Face(*map(int, fields.groups()))
    inside = face.x <= size[0] and face.y <= size[1] and 0 < face.width <= size[0] and 0 < face.height <= size[1]
    return face if inside else None


# Around a face


def _face_crop(face: Face, size: Size, bucket: Size, options: SubsetOptions, draw: random.Random, flipped: bool) -> Crop:
    scale = _face_scale(face, size, bucket, options, draw)
    resized = max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5))
    wobble = 0 if options.random_crop or _is_fixed(options) else int(max(face.width, face.height) * scale) // 20
    corner = []
    for middle, length, side in zip((face.x, face.y), resized, bucket, strict=True):
        middle = int(middle * scale + 0.5)
        start = middle - side // 2
        if options.random_crop:  # a triangle over the image: far from the face is possible, but rare
            reach = max(length - middle, middle)
            start += draw.randint(0, reach) + draw.randint(0, reach) - reach
        elif wobble:
            start += draw.randint(-wobble, wobble)
        corner.append(max(0, min(start, length - side)))
    return Crop(resized, (corner[0], corner[1]), bucket, flipped)


def _face_scale(face: Face, size: Size, bucket: Size, options: SubsetOptions, draw: random.Random) -> float:
    """The scale of the image: the bucket's shorter side shall be `face_crop_aug_range` times the face; nothing is enlarged but to cover."""
    assert options.face_crop_aug_range is not None, "no range of sizes of faces"
    low, high = options.face_crop_aug_range
    longer, shorter = max(face.width, face.height), min(bucket)
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    smallest = min(1.0, max(cover, shorter / (longer * high)))
    largest = min(1.0, max(cover, shorter / (longer * low)))
    return max(cover, draw.uniform(smallest, largest) if smallest < largest else smallest)


def _is_fixed(options: SubsetOptions) -> bool:
    assert options.face_crop_aug_range is not None, "no range of sizes of faces"
    return options.face_crop_aug_range[0] == options.face_crop_aug_range[1]
