"""Anima's models without weights: of full size, or as a checkpoint's header or folder says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.core.tensor_file import save_tensors
from library.models.anima.names import DIT, NAMING
from library.models.anima.outline import anima_outline


def original_state(denoiser: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of the denoiser as the original file names them."""
    targets = [*NAMING.targets(DIT, denoiser), *NAMING.outside(DIT, denoiser)]
    places = {f"{t.module_path}.{kind}": f"{prefix}{t.path}.{kind}" for t in targets for kind in ("weight", "bias")}
    return {places[key]: tensor for key, tensor in denoiser.state_dict().items()}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_sizes_are_read_from_the_header_of_a_file(small_anima_modules: SimpleNamespace, tmp_path: Path, prefix: str):
    path = tmp_path / "anima.safetensors"
    save_tensors(path, original_state(small_anima_modules.denoiser, prefix))
    denoiser, encoder = anima_outline(path)
    assert shapes(denoiser) == shapes(small_anima_modules.denoiser)
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    assert encoder.get_parameter("layers.27.mlp.down_proj.weight").shape == (1024, 3072)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_file_of_the_text_encoder_sizes_the_text_encoder(small_anima_modules: SimpleNamespace, tmp_path: Path, prefix: str):
    path = tmp_path / "qwen.safetensors"
    save_tensors(path, {prefix + key: tensor for key, tensor in small_anima_modules.text_encoder.state_dict().items()})
    denoiser, encoder = anima_outline(path)
    assert shapes(encoder) == shapes(small_anima_modules.text_encoder)
    assert len(NAMING.targets(DIT, denoiser)) == 514


def test_a_diffusers_folder_says_its_sizes(small_anima_modules: SimpleNamespace, tmp_path: Path):
    for name in ("transformer", "text_conditioner"):
        (tmp_path / name).mkdir()
        config = dict(small_anima_modules.denoiser.get_submodule(name).config)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(small_anima_modules.text_encoder.config.to_json_string())
    denoiser, encoder = anima_outline(tmp_path)
    assert shapes(denoiser) == shapes(small_anima_modules.denoiser)
    assert shapes(encoder) == shapes(small_anima_modules.text_encoder)


def test_a_folder_of_single_files_says_the_sizes_of_both(small_anima_files: Any, small_anima_modules: SimpleNamespace):
    denoiser, encoder = anima_outline(small_anima_files.dit.parent)
    assert shapes(denoiser) == shapes(small_anima_modules.denoiser)
    assert shapes(encoder) == shapes(small_anima_modules.text_encoder)


def test_other_files_and_folders_are_refused_by_name(tmp_path: Path):
    save_tensors(tmp_path / "other.safetensors", {"conv_in.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"other.safetensors: not a checkpoint of Anima"):
        anima_outline(tmp_path / "other.safetensors")
    save_tensors(tmp_path / "part.safetensors", {"net.x_embedder.proj.1.weight": torch.zeros(8, 68)})
    with pytest.raises(ValueError, match=r"part.safetensors: has no tensor 'blocks.0.self_attn.q_norm.weight'"):
        anima_outline(tmp_path / "part.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"has no transformer/config.json"):
        anima_outline(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"nothing.safetensors: no such file"):
        anima_outline(tmp_path / "nothing.safetensors")


def test_a_checkpoint_of_another_family_is_told(small_sdxl_file: Path):
    with pytest.raises(ValueError, match=r"not a checkpoint of Anima: .*; it seems to be an SDXL checkpoint"):
        anima_outline(small_sdxl_file)
