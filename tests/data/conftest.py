"""Small folders of noise pictures, and datasets built from a few lines of TOML."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from dataset_samples import noise
from hypothesis import settings
from PIL import Image

from library.data.building import build_training_data
from library.data.dataset import TrainingData
from library.data.options import DataOptions, Size

settings.register_profile("hadron", deadline=None, derandomize=True)  # a shared machine keeps no deadline
settings.load_profile("hadron")

MakeFolder = Callable[..., Path]
Build = Callable[..., TrainingData]


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the project logs."""
    monkeypatch.setattr(logging.getLogger("hadron"), "propagate", True)
    caplog.set_level("INFO", logger="hadron")
    return caplog


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    def make(name: str = "pictures", sizes: Sequence[Size] = ((64, 64),) * 4, caption: str | None = "red, square, {n}") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for n, size in enumerate(sizes):
            Image.fromarray(noise(size, n)).save(folder / f"{n:03d}.png")
            if caption is not None:
                (folder / f"{n:03d}.txt").write_text(caption.format(n=n), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build_from(text: str = "", *, seed: int = 7, **options) -> TrainingData:
        if text:
            path = tmp_path / "data.toml"
            path.write_text(text, encoding="utf-8")
            options["dataset_config"] = path
        return build_training_data(DataOptions(**options), seed=seed, resolution_step=32, default_resolution=64)

    return build_from
