"""What the tests of the data are made of: noise, and a dataset file of one subset."""

from pathlib import Path

import numpy as np

from library.data.options import Size


def noise(size: Size, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Random bytes of a picture (height, width, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def one_subset(folder: Path, dataset: str = "", subset: str = "") -> str:
    """A dataset file with one subset."""
    return f"[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n{subset}\n"
