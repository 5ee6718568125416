"""The canonical names: equal to sd-scripts' at full size, by rule at every other."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from library.models.filling import plan
from library.models.naming import Part
from library.models.sdxl import components, names
from library.models.sdxl.checkpoint import CONSTANTS

DATA = Path(__file__).parent / "data"
ORACLE = {"lora_unet": "unet", "lora_te1": "te1", "lora_te2": "te2"}
COMPONENT = {"lora_unet": components.UNET, "lora_te1": components.TEXT_1, "lora_te2": components.TEXT_2}


def packed(name: str) -> dict:
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


def full_size(part: Part) -> nn.Module:
    """The model of `part` as the shapes of the real checkpoint describe it, without memory."""
    component = COMPONENT[part.prefix]
    shapes = {key: tuple(shape) for key, shape in packed("checkpoint_shapes.json.gz").items() if not CONSTANTS.fullmatch(key)}
    mine = {key.removeprefix(component.prefix): shape for key, shape in shapes.items() if key.startswith(component.prefix)}
    return plan(component, mine).module


@pytest.mark.parametrize("part", names.PARTS, ids=lambda part: part.name)
def test_full_size_names_paths_groups_shapes_and_order_are_those_of_sd_scripts(part: Part):
    module = full_size(part)
    found = [
        [target.name, target.path, target.module_path, target.group, list(module.get_parameter(f"{target.module_path}.weight").shape)]
        for target in names.NAMING.targets(part, module)
    ]
    assert found == packed("lora_names.json.gz")[ORACLE[part.prefix]]


def test_722_layers_are_adapted_by_default_and_788_with_convolutions():
    groups = [target.group for target in names.NAMING.targets(names.UNET, full_size(names.UNET))]
    default = [group for group in groups if group in names.UNET.default_groups]
    convolutions = [group for group in groups if group in names.UNET.conv_groups]
    assert (len(default), len(convolutions)) == (722, 66)
    assert len(groups) == 788


@pytest.mark.parametrize("part", names.PARTS, ids=lambda part: part.name)
def test_small_models_have_unique_names_that_resolve_to_layers(part: Part, small_sdxl_modules: SimpleNamespace):
    module = {
        "lora_unet": small_sdxl_modules.unet,
        "lora_te1": small_sdxl_modules.text_encoder_1,
        "lora_te2": small_sdxl_modules.text_encoder_2,
    }
    targets = names.NAMING.targets(part, module[part.prefix])
    assert len({target.name for target in targets}) == len({target.module_path for target in targets}) == len(targets)
    assert all(isinstance(module[part.prefix].get_submodule(target.module_path), nn.Linear | nn.Conv2d) for target in targets)


def test_every_linear_and_convolution_of_the_blocks_is_a_target(small_sdxl_modules: SimpleNamespace):
    unet = small_sdxl_modules.unet
    layers = {name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    stems = {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
    }
    assert {target.module_path for target in names.NAMING.targets(names.UNET, unet)} == layers - stems


def test_names_of_both_text_encoders_hold_text_model_whatever_the_class_calls_it(small_sdxl_modules: SimpleNamespace):
    first = names.NAMING.targets(names.TEXT_1, small_sdxl_modules.text_encoder_1)[0]
    second = names.NAMING.targets(names.TEXT_2, small_sdxl_modules.text_encoder_2)[0]
    assert first.name == "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"
    assert second.name == "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
    assert first.path == second.path
