"""The table of names: every spelling is of one layer, and every layer is found by each of its spellings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.models.naming import Part, Target, naming_named
from networks.formats.families import family_of, seems_for, underscored
from networks.formats.names import NameTable


@pytest.fixture(scope="module")
def tables() -> dict[str, NameTable]:
    """Both families at full size."""
    return {name: NameTable(naming_named(name), naming_named(name).outline()) for name in ("sdxl", "anima")}


@pytest.mark.parametrize("family", ["sdxl", "anima"])
def test_no_two_layers_share_a_spelling_and_every_spelling_resolves(tables: dict[str, NameTable], family: str):
    table = tables[family]
    means: dict[str, set[str]] = {}
    for spelling, name in table.spellings():
        means.setdefault(spelling, set()).add(name)
    assert all(len(names) == 1 for names in means.values())
    assert all(table.canonical(spelling) == next(iter(names)) for spelling, names in means.items())
    assert {name for names in means.values() for name in names} == set(table.order)


def spellings_of(part: Part, target: Target, prefixes: list[str]) -> list[str]:
    """The dotted spellings that tools write for a layer."""
    inside = target.diffusers_path.partition(".")[2] if not target.path.startswith("llm_adapter") else target.path
    paths = [target.path, target.module_path, inside]
    return [f"{prefix}.{path}" for prefix in prefixes for path in paths] + [
        target.diffusers_path,
        f"base_model.model.{target.diffusers_path}",
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), family=st.sampled_from(["sdxl", "anima"]), is_dotted=st.booleans())
def test_a_layer_is_found_by_any_prefix_and_path_dotted_or_not(
    tables: dict[str, NameTable], data: st.DataObject, family: str, is_dotted: bool
):
    table = tables[family]
    name = data.draw(st.sampled_from(list(table.order)))
    part, target, _ = table.order[name]
    spelling = data.draw(st.sampled_from(spellings_of(part, target, [part.prefix, part.comfyui_prefix, *part.other_prefixes])))
    assert table.canonical(spelling if is_dotted else underscored(spelling)) == name


def test_a_path_that_several_text_encoders_have_is_of_no_single_layer(tables: dict[str, NameTable]):
    found = tables["sdxl"].candidates("base_model.model.text_model.encoder.layers.0.mlp.fc1")
    assert found == {f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1" for n in (1, 2)}


def test_layers_of_animas_adapter_are_not_taken_for_the_transformers(tables: dict[str, NameTable]):
    table = tables["anima"]
    assert table.canonical("base_model.model.blocks.0.self_attn.q_proj") == "lora_unet_blocks_0_self_attn_q_proj"
    assert table.canonical("text_conditioner.blocks.0.self_attn.q_proj") == "lora_unet_llm_adapter_blocks_0_self_attn_q_proj"
    assert table.canonical("base_model.model.blocks.0.self_attn.o_proj") is None


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["lora_unet_input_blocks_4_1_proj_in"], "SDXL"),
        (["unet.down_blocks.1.attentions.0.proj_in"], "SDXL"),
        (["text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1"], "SDXL"),
        (["lora_unet_blocks_0_self_attn_q_proj"], "Anima"),
        (["transformer.transformer_blocks.0.attn1.to_q"], "Anima"),
        (["diffusion_model.llm_adapter.blocks.0.mlp.0"], "Anima"),
        (["diffusion_model.blocks.0.self_attn.output_proj", "diffusion_model.blocks.0.self_attn.q_norm"], "Anima"),
        (["lora_te1_layers_0_mlp_up_proj"], "Anima"),
        (["text_encoder.layers.0.self_attn.q_proj"], "Anima"),
        (["text_encoders.transformer.model.layers.0.self_attn.q_proj"], "Anima"),
        (["te2.text_model.encoder.layers.0.mlp.fc1"], "SDXL"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"], "Stable Diffusion 1 or 2"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1"], "Stable Diffusion 1 or 2"),
        (["lora_unet_double_blocks_0_img_attn_proj"], "FLUX"),
        (["transformer.single_transformer_blocks.0.proj_mlp", "transformer.transformer_blocks.0.ff.net.0.proj"], "FLUX"),
        (["diffusion_model.blocks.0.self_attn.q"], "Wan"),
        (["something_else"], None),
    ],
)
def test_the_family_is_told_by_names(names: list[str], title: str | None):
    assert seems_for(names) == title
    known = family_of(names)
    if title in ("SDXL", "Anima"):
        assert known is not None and known.title == title


def test_a_table_of_no_layers_knows_none():
    naming = naming_named("sdxl")
    assert NameTable(naming, []).candidates("lora_unet_input_blocks_4_1_proj_in") == set()
    assert NameTable(naming, []).is_left_out("lora_te1_text_model_encoder_layers_0_mlp_fc1")
