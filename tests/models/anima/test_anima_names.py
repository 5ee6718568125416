"""The canonical names of Anima: equal to sd-scripts' at full size, in each of the class trees, and nothing else is taken for it."""

import copy
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from library.models.anima.denoiser import AnimaDiT
from library.models.anima.names import DIT, NAMING, PARTS, TEXT
from library.models.naming import Part, Target, naming_of

DATA = Path(__file__).parent / "data" / "lora_names.json.gz"


@pytest.fixture(scope="module")
def oracle() -> dict[str, list]:
    return json.loads(gzip.decompress(DATA.read_bytes()))


@pytest.fixture(scope="module")
def full_size() -> dict[str, nn.Module]:
    return {part.prefix: module for part, module in NAMING.outline()}


def put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """`layer` in a bare tree, at a dotted path."""
    above, _, last = path.rpartition(".")
    for name in filter(None, above.split(".")):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, layer)


def original_tree(denoiser: nn.Module) -> nn.Module:
    """A denoiser with the same layers in the tree of the original, as sd-scripts' own class has it."""
    root = nn.Module()
    for target in [*NAMING.targets(DIT, denoiser), *NAMING.outside(DIT, denoiser)]:
        put(root, target.path, denoiser.get_submodule(target.module_path))
    return root


def test_full_size_names_paths_groups_shapes_and_order_are_those_of_sd_scripts(oracle: dict[str, list], full_size: dict[str, nn.Module]):
    found = NAMING.targets(DIT, full_size["lora_unet"])
    shapes = [list(full_size["lora_unet"].get_submodule(target.module_path).weight.shape) for target in found]
    rows = [[t.name, t.path, t.diffusers_path, t.group, shape] for t, shape in zip(found, shapes, strict=True)]
    assert rows == [row[:-1] for row in oracle["lora_unet"]]
    text = NAMING.targets(TEXT, full_size["lora_te"])
    assert [[t.name, t.path, list(full_size["lora_te"].get_submodule(t.module_path).weight.shape)] for t in text] == oracle["lora_te"]


def test_280_layers_are_adapted_by_default_340_with_the_adapter_and_454_without_excludes(full_size: dict[str, nn.Module]):
    targets = NAMING.targets(DIT, full_size["lora_unet"])
    grouped = [target.path for target in targets if target.group in DIT.default_groups]
    default = [path for path in grouped if not any(re.fullmatch(pattern, path) for pattern in DIT.default_excludes)]
    adapter = [target for target in targets if target.group in DIT.extra_groups["train_llm_adapter"]]
    assert (len(default), len(default) + len(adapter), len(grouped)) == (280, 340, 454)
    assert len(NAMING.targets(TEXT, full_size["lora_te"])) == 196


def test_the_groups_are_those_of_the_oracle(oracle: dict[str, list], full_size: dict[str, nn.Module]):
    excluded = {row[1] for row in oracle["lora_unet"] if row[-1] == "excluded_by_default"}
    targets = NAMING.targets(DIT, full_size["lora_unet"])
    assert {t.path for t in targets if any(re.fullmatch(pattern, t.path) for pattern in DIT.default_excludes)} == excluded


def test_every_tree_has_the_same_names_at_its_own_paths(small_anima_modules: SimpleNamespace):
    wrapper = small_anima_modules.denoiser
    transformer, original = wrapper.get_submodule("transformer"), original_tree(wrapper)
    in_wrapper = NAMING.targets(DIT, wrapper)
    in_original = NAMING.targets(DIT, original)
    assert all(target.path == target.module_path for target in in_original)
    assert all(target.diffusers_path == target.module_path for target in in_wrapper)
    assert [(t.name, t.diffusers_path) for t in in_original] == [(t.name, t.diffusers_path) for t in in_wrapper]
    alone = [(t.name, f"transformer.{t.module_path}") for t in NAMING.targets(DIT, transformer)]
    assert alone == [(t.name, t.module_path) for t in in_wrapper if not t.path.startswith("llm_adapter.")]


def every(part: Part, module: nn.Module) -> list[Target]:
    return [*NAMING.targets(part, module), *NAMING.outside(part, module)]


def test_targets_and_the_layers_outside_the_table_are_all_layers_with_a_weight(small_anima_modules: SimpleNamespace):
    wrapper = small_anima_modules.denoiser
    modules = ((DIT, wrapper), (DIT, original_tree(wrapper)), (TEXT, small_anima_modules.text_encoder))
    for part, module in modules:
        weighted = {path for path, layer in module.named_modules() if layer._parameters.get("weight") is not None}
        assert {target.module_path for target in every(part, module)} == weighted
        assert len({target.name for target in every(part, module)}) == len(weighted)


def test_the_output_projection_of_the_adapter_is_in_no_group_but_named(small_anima_modules: SimpleNamespace):
    (found,) = [t for t in NAMING.outside(DIT, small_anima_modules.denoiser) if t.path == "llm_adapter.out_proj"]
    assert (found.name, found.diffusers_path) == ("lora_unet_llm_adapter_out_proj", "text_conditioner.out_proj")


def test_the_class_trees_are_recognised_and_others_are_not(small_anima_modules: SimpleNamespace, small_sdxl_modules: SimpleNamespace):
    wrapper = small_anima_modules.denoiser
    for denoiser in (wrapper, wrapper.get_submodule("transformer"), original_tree(wrapper)):
        naming = naming_of(denoiser)
        assert naming is not None and naming.name == "anima"
    for other in (small_sdxl_modules.unet, small_anima_modules.text_encoder, wrapper.get_submodule("text_conditioner"), nn.Linear(2, 2)):
        assert not NAMING.recognises(other)


def test_the_first_cosmos_with_learned_positions_is_not_taken_for_anima(small_anima_modules: SimpleNamespace):
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "adaln_lora_dim": 8, "max_size": (8, 8, 8)}
    assert not NAMING.recognises(CosmosTransformer3DModel(**sizes, extra_pos_embed_type="learnable"))
    assert NAMING.recognises(CosmosTransformer3DModel(**sizes, extra_pos_embed_type=None))


def test_the_text_encoder_is_named_alike_inside_a_causal_language_model(small_anima_modules: SimpleNamespace):
    encoder = small_anima_modules.text_encoder
    inside = nn.ModuleDict({"model": encoder, "lm_head": nn.Linear(2, 2)})
    bare, wrapped = (NAMING.targets(TEXT, module) for module in (encoder, inside))
    assert [(t.name, f"model.{t.module_path}") for t in bare] == [(t.name, t.module_path) for t in wrapped]


def test_parts_have_prefixes_of_their_own():
    assert [part.prefix for part in PARTS] == ["lora_unet", "lora_te"]


def test_the_denoiser_that_is_trained_has_the_names_of_its_plain_modules(full_size: dict[str, nn.Module]):
    plain = full_size["lora_unet"]
    before = NAMING.targets(DIT, plain)
    trained = AnimaDiT(*(copy.deepcopy(plain.get_submodule(name)) for name in ("transformer", "text_conditioner")))
    assert NAMING.targets(DIT, trained) == before and NAMING.recognises(trained)
    assert {name: tensor.shape for name, tensor in trained.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
