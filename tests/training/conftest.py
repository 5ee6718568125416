"""What training tests share: pictures with captions, and every family's tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from small_family import SmallFamily

from library.models.architecture import architecture_named, architecture_names


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five noisy pictures of three shapes, with captions, and their dataset file."""
    folder = tmp_path_factory.mktemp("images")
    for index, (width, height) in enumerate([(64, 64), (64, 64), (96, 64), (64, 96), (64, 64)]):
        Image.effect_noise((width, height), 40 + index).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {('cat', 'dog')[index % 2]}, red")
    (folder / "dataset.toml").write_text(
        "[general]\nresolution = [96, 64]\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 32\n"
        f"[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder}'\nflip_aug = true\n"
    )
    return folder


@pytest.fixture(scope="session")
def small_family(small_model_options: Callable[[str], tuple[str, ...]]) -> Callable[[str], SmallFamily]:
    """A family's tiny model by its name."""
    return lambda name: SmallFamily(architecture_named(name), small_model_options(name))


@pytest.fixture(params=architecture_names())
def family(request: pytest.FixtureRequest, small_family: Callable[[str], SmallFamily]) -> SmallFamily:
    """Every family, one after the other."""
    return small_family(request.param)


@pytest.fixture
def sdxl(small_family: Callable[[str], SmallFamily]) -> SmallFamily:
    """SDXL."""
    return small_family("sdxl")


@pytest.fixture
def anima(small_family: Callable[[str], SmallFamily]) -> SmallFamily:
    """Anima."""
    return small_family("anima")
