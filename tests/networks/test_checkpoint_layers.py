"""Layers filled from a checkpoint have the weights of the loaded model; what a checkpoint lacks is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.core.tensor_file import load_tensors, save_tensors
from library.models.architecture import Models
from library.models.naming import naming_named
from networks import lora
from networks.checkpoint_layers import CheckpointTensors, fill_layers
from networks.network import Network


@pytest.fixture
def network(sdxl: Models) -> Network:
    return lora.create_network(1.0, 2, 1.0, None, sdxl.text_encoders, sdxl.denoiser, conv_dim=2)


def weights(network: Network) -> list[Tensor]:
    layers: list[Any] = [member.adapter.layer for member in network.members]
    return [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]


def emptied(network: Network) -> None:
    """The models without their weights, as an outline is."""
    for _, module in network.parts:
        module.to("meta")


def changed(path: Path, source: Path, **changes: Tensor | None) -> Path:
    """A copy of a checkpoint with other tensors; None leaves one out. `__` stands for a dot."""
    tensors = {key: tensor.clone() for key, tensor in load_tensors(source).items()}
    tensors |= {key.replace("__", "."): tensor for key, tensor in changes.items() if tensor is not None}
    save_tensors(path, {key: tensor for key, tensor in tensors.items() if changes.get(key.replace(".", "__"), tensor) is not None})
    return path


KEY = "model__diffusion_model__input_blocks__3__1__proj_in__weight"


def test_adapted_layers_get_the_weights_of_the_loaded_model(network: Network, small_sdxl_file: Path):
    before = [tensor.clone() for tensor in weights(network)]
    emptied(network)
    assert all(tensor.is_meta for tensor in weights(network))
    fill_layers(network, small_sdxl_file)
    assert len(before) > 100
    assert all(torch.equal(tensor, old) for tensor, old in zip(weights(network), before, strict=True))


def test_members_alone_are_filled_by_the_outline_that_the_checkpoint_describes(network: Network, small_sdxl_file: Path):
    before = [tensor.clone() for tensor in weights(network)]
    emptied(network)
    fill_layers(network.members, small_sdxl_file, torch.float64)
    assert all(torch.equal(tensor, old.double()) for tensor, old in zip(weights(network), before, strict=True))


@pytest.mark.parametrize("shard_size", ["10GB", "1MB"])
def test_a_diffusers_folder_fills_them_too(network: Network, sdxl: Models, tmp_path: Path, shard_size: str):
    before = [tensor.clone() for tensor in weights(network)]
    names = ("unet", "text_encoder", "text_encoder_2")
    for name, module in zip(names, (sdxl.denoiser, *sdxl.text_encoders), strict=True):
        module.save_pretrained(tmp_path / name, max_shard_size=shard_size)  # pyright: ignore[reportCallIssue]
    assert (len(list(tmp_path.glob("unet/*.safetensors"))) > 1) == (shard_size == "1MB")
    emptied(network)
    fill_layers(network, tmp_path)
    assert all(torch.equal(tensor, old) for tensor, old in zip(weights(network), before, strict=True))


def test_the_first_variant_of_a_folder_counts(network: Network, sdxl: Models, tmp_path: Path):
    unet: Any = sdxl.denoiser
    unet.save_pretrained(tmp_path / "unet", variant="fp16")
    unet.save_pretrained(tmp_path / "unet")
    tensors = CheckpointTensors(tmp_path, network.naming, network.parts)
    assert [reader.path.name for _, reader in tensors.files] == ["diffusion_pytorch_model.safetensors"]
    tensors.close()


def test_layers_that_a_checkpoint_lacks_are_named_before_any_is_filled(network: Network, small_sdxl_file: Path, tmp_path: Path):
    emptied(network)
    path = changed(tmp_path / "b.safetensors", small_sdxl_file, **{KEY: None})
    with pytest.raises(ValueError, match=r"b.safetensors: lacks 1 of the adapted layers: lora_unet_input_blocks_3_1_proj_in"):
        fill_layers(network, path)
    assert all(tensor.is_meta for tensor in weights(network))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 5), r"proj_in.weight' has the shape \[3, 5\]; \[64, 64\] was expected"),
        (torch.zeros(64, 64, dtype=torch.int8), r"proj_in.weight' holds whole numbers"),
    ],
)
def test_weights_that_do_not_fit_are_named(network: Network, small_sdxl_file: Path, tmp_path: Path, tensor: Tensor, message: str):
    with pytest.raises(ValueError, match=f"b.safetensors: .*{message}"):
        fill_layers(network, changed(tmp_path / "b.safetensors", small_sdxl_file, **{KEY: tensor}))


def test_weights_with_scales_of_their_own_are_refused(network: Network, small_sdxl_file: Path, tmp_path: Path):
    path = changed(tmp_path / "b.safetensors", small_sdxl_file, **{KEY.replace("__weight", "__scale_weight"): torch.ones(())})
    with pytest.raises(ValueError, match=r"b.safetensors: holds quantised weights with scales of their own \(.*proj_in.scale_weight\)"):
        fill_layers(network, path)


def test_a_folder_of_single_files_is_one_checkpoint(small_anima_files: Any):
    naming, folder = naming_named("anima"), small_anima_files.dit.parent
    tensors, parts = CheckpointTensors(folder, naming), naming.outline(folder)
    for (part, module), file in zip(parts, (small_anima_files.dit, small_anima_files.qwen3), strict=True):
        stored, targets = load_tensors(file), naming.targets(part, module)
        assert targets
        for target in targets:
            [key] = [key for key in stored if key.removeprefix("net.").removeprefix("model.") == f"{target.path}.weight"]
            assert torch.equal(tensors.weight(part, target), stored[key])
    tensors.close()


def test_an_empty_folder_is_no_checkpoint(network: Network, tmp_path: Path):
    with pytest.raises(ValueError, match="a folder without safetensors files"):
        CheckpointTensors(tmp_path, network.naming, network.parts)


def test_single_weights_are_told_and_read(network: Network, small_sdxl_file: Path):
    tensors = CheckpointTensors(small_sdxl_file, network.naming)
    for member in network.members:
        layer: Any = member.adapter.layer
        assert tensors.has(member.part, member.target)
        assert torch.equal(tensors.weight(member.part, member.target), layer.weight)
    lost = next(member for member in network.members if member.adapter.layer.bias is None)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=f"small.safetensors: has no bias for {lost.target.name}"):
        tensors.bias(lost.part, lost.target)
    tensors.close()
