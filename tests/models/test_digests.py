"""What caches are named by."""

from pathlib import Path

import pytest

from library.models.digests import model_files


def test_a_folders_configuration_counts_beside_its_weights(tmp_path: Path) -> None:
    for name in ("vae/config.json", "vae/model.safetensors", "vae/readme.md", "unet/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in model_files(tmp_path)]
    assert found == ["unet/model.safetensors", "vae/model.safetensors", "vae/config.json"]


def test_a_place_without_weights_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(ValueError, match="no such file, and no folder with safetensors files"):
            model_files(place)
