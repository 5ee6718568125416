"""SDXL's models without weights: of full size, or as a checkpoint's header or folder says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.core.tensor_file import load_tensors, save_tensors
from library.models.sdxl.names import NAMING, PARTS
from library.models.sdxl.outline import sdxl_outline


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def modules(small: SimpleNamespace) -> list[nn.Module]:
    return [small.unet, small.text_encoder_1, small.text_encoder_2]


def test_at_full_size_it_has_the_layers_of_the_oracle_and_no_memory():
    outline = NAMING.outline()
    assert [part for part, _ in outline] == list(PARTS)
    assert [len(NAMING.targets(part, module)) for part, module in outline] == [788, 72, 192]
    assert all(parameter.is_meta for _, module in outline for parameter in module.parameters())


def test_sizes_are_read_from_the_header_of_a_file(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path):
    assert [shapes(module) for module in sdxl_outline(small_sdxl_file)] == [shapes(module) for module in modules(small_sdxl_modules)]


def test_sizes_are_read_from_a_folder(small_sdxl_modules: SimpleNamespace, tmp_path: Path):
    for name, module in zip(("unet", "text_encoder", "text_encoder_2"), modules(small_sdxl_modules), strict=True):
        module.save_pretrained(tmp_path / name)
    assert [shapes(module) for module in sdxl_outline(tmp_path)] == [shapes(module) for module in modules(small_sdxl_modules)]


def test_what_a_file_does_not_hold_is_at_full_size(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    kept = {key: value for key, value in load_tensors(small_sdxl_file).items() if key.startswith("model.diffusion_model.")}
    save_tensors(tmp_path / "unet.safetensors", kept)
    unet, first, second = sdxl_outline(tmp_path / "unet.safetensors")
    assert shapes(unet) == shapes(small_sdxl_modules.unet)
    assert (len(NAMING.targets(PARTS[1], first)), len(NAMING.targets(PARTS[2], second))) == (72, 192)


def test_broken_and_missing_files_are_named(small_sdxl_file: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing.safetensors: no such file"):
        sdxl_outline(tmp_path / "nothing.safetensors")
    kept = load_tensors(small_sdxl_file)
    kept.pop("model.diffusion_model.input_blocks.0.0.weight")
    save_tensors(tmp_path / "part.safetensors", kept)
    with pytest.raises(ValueError, match=r"part.safetensors: the U-Net .*input_blocks.0.0.weight"):
        sdxl_outline(tmp_path / "part.safetensors")
    save_tensors(tmp_path / "none.safetensors", {"a.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"none.safetensors: not an SDXL checkpoint: "):
        sdxl_outline(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"has none of unet, text_encoder and text_encoder_2"):
        sdxl_outline(tmp_path)


def test_a_u_net_without_size_conditioning_is_refused(small_sdxl_file: Path, tmp_path: Path):
    kept = {key: value for key, value in load_tensors(small_sdxl_file).items() if ".label_emb." not in key}
    save_tensors(tmp_path / "sd1.safetensors", kept)
    with pytest.raises(ValueError, match=r"sd1.safetensors: not an SDXL checkpoint: "):
        sdxl_outline(tmp_path / "sd1.safetensors")
