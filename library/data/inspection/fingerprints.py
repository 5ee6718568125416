"""Fingerprints of pictures: 64 bits that survive resizing, recompression and small changes of tone, and a coarse patch of colours.

The bits are the signs of the lowest frequencies of a cosine transform of the picture in 32x32 greys, after "Implementation and
Benchmarking of Perceptual Image Hash Functions" (Zauner 2010), section 3.2.1, which compares with their median: around zero it is the
same for a picture with contrast, and a mirrored picture is known by its odd columns alone. Two pictures with like bits may still differ
in colour: the patch decides.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE, LOW = 32, 8  # greys that are transformed, frequencies that are kept, each way
PATCH = 8  # side of the patch of colours
QUIET = 4.0  # a frequency below it counts as absent: noise would set its sign


@dataclass(frozen=True)
class Fingerprint:
    """The bits of a picture and of its mirror image, and its patch (8, 8, 3) uint8."""

    bits: int
    mirrored: int
    patch: np.ndarray


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture of any size; the aspect ratio does not count."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    waves = _cosines() @ np.asarray(small.convert("L"), dtype=np.float64) @ _cosines().T
    waves[0, 0] = 0  # the mean brightness
    patch = np.asarray(small.resize((PATCH, PATCH), Image.Resampling.BOX))
    signs = np.where(np.arange(LOW) % 2, -1.0, 1.0)  # of the columns, when left and right change places
    return Fingerprint(_bits(waves), _bits(waves * signs), patch)


def _cosines() -> np.ndarray:
    """The first rows of the orthonormal cosine transform (DCT-II), (LOW, SIDE)."""
    rows, columns = np.arange(LOW)[:, None], np.arange(SIDE)[None, :]
    waves = np.cos(np.pi * rows * (2 * columns + 1) / (2 * SIDE)) * np.sqrt(2 / SIDE)
    waves[0] /= np.sqrt(2)
    return waves


def _bits(waves: np.ndarray) -> int:
    return int.from_bytes(np.packbits(waves.reshape(-1) > QUIET).tobytes(), "big")
