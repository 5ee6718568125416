"""Places: every tensor of a model is found in a checkpoint, and a change through its view is a change of the loaded model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.core.tensor_file import load_tensors, save_tensors
from library.models.naming import Part, Place
from library.models.sdxl.checkpoint import load_checkpoint
from library.models.sdxl.names import NAMING, TEXT_1, TEXT_2, UNET
from library.models.sdxl.places import sdxl_places

MODELS = ((UNET, "unet"), (TEXT_1, "text_encoder_1"), (TEXT_2, "text_encoder_2"))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[2] in ("weight", "bias")}


@pytest.mark.parametrize(("part", "name"), MODELS)
def test_every_weight_and_bias_is_read_bit_for_bit(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, part: Part, name: str):
    module = getattr(small_sdxl_modules, name)
    stored = load_tensors(small_sdxl_file)
    places = NAMING.places(part, module)
    assert list(places) == list(values(module))
    assert all(torch.equal(places[key].view(stored[places[key].key]), tensor) for key, tensor in values(module).items())


def test_what_is_written_through_the_views_is_what_is_loaded_again(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path
):
    stored = {key: tensor.clone() for key, tensor in load_tensors(small_sdxl_file).items()}
    wanted = {}
    for part, name in MODELS:
        for key, place in NAMING.places(part, getattr(small_sdxl_modules, name)).items():
            view = place.view(stored[place.key])
            wanted[name, key] = torch.full(view.shape, float(len(wanted)))
            view.copy_(wanted[name, key])
    save_tensors(tmp_path / "changed.safetensors", stored)
    loaded: Any = load_checkpoint(tmp_path / "changed.safetensors", dtype=torch.float32, device=torch.device("cpu"))
    assert len(wanted) > 300
    assert all(torch.equal(getattr(loaded, name).state_dict()[key], tensor) for (name, key), tensor in wanted.items())


def test_a_folder_in_diffusers_layout_has_its_places_too(small_sdxl_modules: SimpleNamespace, tmp_path: Path):
    for part, name in MODELS:
        module: Any = getattr(small_sdxl_modules, name)
        module.save_pretrained(tmp_path / name)
        (file,) = (tmp_path / name).glob("*.safetensors")
        stored = load_tensors(file)
        folder = {"unet": "unet", "text_encoder_1": "text_encoder", "text_encoder_2": "text_encoder_2"}[name]
        for key, tensor in values(module).items():
            others = [place for place in NAMING.places(part, module)[key].others if place.key.startswith(f"{folder}/")]
            found = [place for place in others if place.key.removeprefix(f"{folder}/") in stored]
            assert len(found) == 1
            assert torch.equal(found[0].view(stored[found[0].key.removeprefix(f"{folder}/")]), tensor)


def test_a_matrix_is_seen_as_the_pointwise_convolution_that_the_model_has_and_the_other_way():
    tree = nn.Module()
    tree.blocks = nn.Conv2d(4, 6, 1, bias=False)
    tree.projection = nn.Linear(4, 6, bias=False)
    for name, stored in (("blocks", (6, 4)), ("projection", (6, 4, 1, 1))):
        place = original_tree_places(tree)[f"{name}.weight"]
        assert place.view(torch.empty(stored)).shape == tree.get_submodule(name).weight.shape
        assert place.view(torch.empty(4, 6)).shape == (4, 6), "another shape stays visible"


def original_tree_places(tree: nn.Module) -> dict[str, Place]:
    for name in ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"):
        tree.add_module(name, nn.ModuleList())
    return sdxl_places(UNET, tree)


def test_module_paths_are_the_keys_in_the_original_class_tree():
    tree = nn.Module()
    tree.other = nn.Linear(2, 3)
    assert {name: place.key for name, place in original_tree_places(tree).items()} == {
        "other.weight": "model.diffusion_model.other.weight",
        "other.bias": "model.diffusion_model.other.bias",
    }
