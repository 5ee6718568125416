"""Every image and mask decoded once: what is broken, which files are the same, and how each looks."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from library.core.file_hash import file_sha256
from library.data.dataset import TrainingData
from library.data.images.files import measure, read_rgb
from library.data.inspection.fingerprints import Fingerprint, fingerprint

THREADS = 8
FEW = 50  # files that are read too soon for a progress bar


class Look(NamedTuple):
    """One file: the hash of its bytes, and how it looks or why it cannot be decoded."""

    path: Path
    sha256: str
    print: Fingerprint | None
    problem: str | None


@dataclass(frozen=True)
class Looks:
    """All files that were looked at: those that can be decoded in the order given, and the problems of the others."""

    sound: list[Look]
    problems: dict[Path, str]


def look_at(paths: Iterable[Path], *, threads: int | None = None) -> Looks:
    """Decode every file, each once however often it is named; nothing is written. Memory is about 500 bytes a file."""
    wanted = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(threads or min(THREADS, os.cpu_count() or 1)) as pool:
        looks = list(tqdm(pool.map(_look, wanted), desc="images", total=len(wanted), disable=len(wanted) < FEW))
    return Looks([look for look in looks if look.problem is None], {look.path: look.problem for look in looks if look.problem is not None})


def mask_problems(data: TrainingData) -> Iterator[str]:
    """What is wrong with the masks of the images: files that cannot be decoded."""
    images = (image for source in (data, data.validation) if source is not None for image in source.images)
    yield from measure([image.mask for image in images if image.mask is not None], whole=True)[1].values()


def _look(path: Path) -> Look:
    try:
        return Look(path, file_sha256(path), fingerprint(read_rgb(path)), None)
    except (ValueError, OSError) as error:
        return Look(path, "", None, str(error))
