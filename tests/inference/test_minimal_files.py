"""Files of latents: exact, and refused by name where they hold none of one picture."""

from pathlib import Path

import pytest
import torch
from minimal_runs import ANIMA

from library.core.tensor_file import save_tensors
from library.inference.minimal.files import PictureFolder, read_latents


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_latents_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    latents = random(16, 6, 4)
    parameters = {"seed": "3", "prompt": "\u732b", "negative-prompt": "", "steps": "5", "scale": "2.5", "width": "32", "height": "48"}
    path = PictureFolder(tmp_path, with_metadata=True).save_latents(latents, parameters)
    again, found = read_latents(path, ANIMA)
    assert torch.equal(again, latents) and found == parameters


@pytest.mark.parametrize("shape", [(16, 6, 4), (1, 16, 6, 4), (16, 1, 6, 4), (1, 16, 1, 6, 4), (16, 1, 4), (16, 16, 1)])
def test_other_tools_axes_are_understood(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"latent": random(*shape).half()})
    latents, parameters = read_latents(tmp_path / "x.safetensors", ANIMA)
    height, width = shape[-2:]
    assert latents.shape == (16, height, width) and latents.dtype == torch.float32 and parameters == {}


@pytest.mark.parametrize("shape", [(4, 6, 4), (2, 16, 6, 4), (1, 16, 3, 6, 4), (16, 4), (16,), (16, 0, 4)])
def test_what_is_not_one_picture_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"latent": random(*shape)})
    with pytest.raises(ValueError, match=r"x.safetensors: latents of shape .* are not one picture of Anima"):
        read_latents(tmp_path / "x.safetensors", ANIMA)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"weight": random(2)})
    with pytest.raises(ValueError, match="not a file of latents: it has no tensor 'latent'"):
        read_latents(tmp_path / "x.safetensors", ANIMA)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"latent": torch.full((16, 2, 2), torch.nan)})
    with pytest.raises(ValueError, match="its latents are not finite"):
        read_latents(tmp_path / "x.safetensors", ANIMA)
