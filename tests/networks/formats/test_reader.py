"""Files as each tool writes them mean the adapters that were in it; what is not understood is named."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from spelt import assert_same, own_values, peft_values, read, spelt
from torch import Tensor, nn

from library.models.naming import naming_named
from networks.difference import Difference
from networks.files import AdapterFile
from networks.formats import reader
from networks.formats.peft_config import read_metadata
from networks.formats.reader import read_members
from networks.layers import LayerShape
from networks.members import Member


def flat(path: str) -> str:
    return path.replace(".", "_")


TOOLS = {
    "kohya": lambda m: m.target.name,
    "the class tree": lambda m: flat(f"{m.part.prefix}.{m.target.module_path}"),
    "ComfyUI": lambda m: f"{m.part.comfyui_prefix}.{m.target.path}",
    "diffusers": lambda m: m.target.diffusers_path,
    "PEFT": lambda m: f"base_model.model.{m.target.diffusers_path}",
}
ALONE = {  # spellings of the denoiser only
    "LyCORIS standalone": lambda m: flat(f"lycoris.{m.target.module_path}"),
    "the original checkpoint": lambda m: f"model.diffusion_model.{m.target.path}",
    "PEFT on the denoiser": lambda m: f"base_model.model.{m.target.module_path}",
    "bare paths": lambda m: m.target.path,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", ["sdxl", "anima"])
def test_names_of_every_tool_are_understood(request: pytest.FixtureRequest, family: str, tool: str):
    small = request.getfixturevalue(family)
    members = small.members(part=None)
    assert_same(read(small, spelt(members, TOOLS[tool])), members)


@pytest.mark.parametrize("tool", ALONE)
@pytest.mark.parametrize("family", ["sdxl", "anima"])
def test_names_of_the_denoiser_alone_are_understood(request: pytest.FixtureRequest, family: str, tool: str):
    small = request.getfixturevalue(family)
    members = small.members()
    assert_same(read(small, spelt(members, ALONE[tool])), members)


@pytest.mark.parametrize(
    "prefix", ["lora_te1_", "lora_te_model_", "text_encoders.qwen3_06b.transformer.model.", "text_encoders.transformer.model."]
)
def test_every_spelling_of_animas_text_encoder_is_understood(anima, prefix: str):
    members = anima.members(part=1)
    names = {m.target.name: prefix + (m.target.path if "." in prefix else flat(m.target.path)) for m in members}
    assert_same(read(anima, spelt(members, lambda m: names[m.target.name])), members)


@pytest.mark.parametrize("prefix", ["net.", "transformer.", "lora_transformer_", "diffusion_model."])
def test_every_spelling_of_animas_denoiser_is_understood(anima, prefix: str):
    members = anima.members()
    name = (lambda m: prefix + m.target.path) if "." in prefix else (lambda m: prefix + flat(m.target.path))
    assert_same(read(anima, spelt(members, name)), members)


def test_the_output_projection_of_animas_adapter_is_read(anima):
    layer = anima.parts[0][1].get_submodule("text_conditioner.out_proj")
    (found,) = read(anima, {"diffusion_model.llm_adapter.out_proj.diff": torch.ones(layer.weight.shape)})
    assert found.target.module_path == "text_conditioner.out_proj" and torch.equal(found.adapter.delta_weight(), torch.ones(24, 24))


# Tools and their ways


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_onetrainer_stores_factors_of_convolutions_with_four_dimensions(sdxl, algorithm: str):
    members = sdxl.members(algorithm, only="in_layers")

    def values(member: Member) -> dict[str, Tensor]:
        kernel = member.adapter.shape.kernel
        return {
            key: value.unflatten(1, (-1, *kernel)) if key.endswith("_b") and value.shape[1] % 9 == 0 else value[:, :, None, None]
            if key.endswith(("_a", "_b")) else value
            for key, value in own_values(member).items()
        }  # fmt: skip

    tensors = spelt(members, TOOLS["kohya"], values)
    assert any(value.dim() == 4 for key, value in tensors.items() if key.endswith("_b"))
    assert_same(read(sdxl, tensors), members)


def test_ai_toolkit_writes_an_alpha_of_1e10_that_means_nothing(sdxl):
    members = sdxl.members("lokr", only="attn1", full_matrix=True)
    for alpha in (1e10, float("inf"), float("nan"), 0.0):
        tensors = spelt(members, TOOLS["ComfyUI"], lambda m, alpha=alpha: own_values(m) | {"alpha": torch.tensor(alpha)})
        assert_same(read(sdxl, tensors), members)


def test_an_infinite_alpha_that_matters_is_refused_by_name(sdxl):
    members = sdxl.members("loha", only="input_blocks.3.1.proj_in")
    tensors = spelt(members, TOOLS["kohya"], lambda m: own_values(m) | {"alpha": torch.tensor(float("inf"), dtype=torch.float16)})
    with pytest.raises(ValueError, match=r"lora_unet_\w+.alpha: .*inf.* is not a finite number"):
        read(sdxl, tensors)


def test_diffusion_pipe_writes_no_alpha_which_means_the_rank(sdxl):
    members = sdxl.members("lokr", only="attn2", rank=1, factor=4)
    for member in members:
        member.adapter.set_alpha(member.adapter.rank)
    assert_same(read(sdxl, spelt(members, TOOLS["ComfyUI"], peft_values)), members)


def test_diffusers_before_peft_named_layers_after_their_processors(sdxl):
    members = sdxl.members(only="attn1")
    words = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight", "alpha": "alpha"}

    def name(member: Member) -> str:
        above, _, last = member.target.diffusers_path.removesuffix(".0").rpartition(".")
        return f"{above}.processor.{last}_lora"

    tensors = spelt(members, name, lambda m: {words[key]: value for key, value in own_values(m).items()})
    assert any("processor.to_out_lora.down.weight" in key for key in tensors)
    assert_same(read(sdxl, tensors), members)


def test_diffusers_before_peft_named_text_layers_lora_linear_layer(sdxl):
    members = sdxl.members(part=1)
    words = {"lora_down.weight": "lora_linear_layer.down.weight", "lora_up.weight": "lora_linear_layer.up.weight", "alpha": "alpha"}
    tensors = spelt(members, TOOLS["diffusers"], lambda m: {words[key]: value for key, value in own_values(m).items()})
    assert_same(read(sdxl, tensors), members)


def test_diffusers_writes_alphas_into_the_metadata(sdxl):
    members = sdxl.members(part=None, only="1.attn2") + sdxl.members(part=1)
    first = members[0].target.diffusers_path.removeprefix("unet.")
    table = {
        "unet.r": 2, "unet.lora_alpha": 1.5, "unet.alpha_pattern": {first: 6}, "text_encoder.r": 2, "text_encoder.lora_alpha": 3,
    }  # fmt: skip
    members[0].adapter.set_alpha(6)
    for member in members:
        if not member.part.is_denoiser:
            member.adapter.set_alpha(3)
    config = read_metadata(json.dumps(table), "metadata")
    file = AdapterFile(tensors=spelt(members, TOOLS["diffusers"], peft_values), config=config)
    assert_same(read(sdxl, file), members)


def test_lycoris_mixes_algorithms_norms_and_whole_differences(sdxl):
    first, second = sdxl.members("lora", only="proj_in"), sdxl.members("lokr", only="proj_out")
    tensors = spelt([*first, *second], TOOLS["kohya"])
    tensors["lora_unet_input_blocks_1_0_in_layers_0.w_norm"] = torch.full((32,), 0.5)
    tensors["lora_unet_input_blocks_1_0_in_layers_0.b_norm"] = torch.full((32,), 0.25)
    tensors["lora_unet_time_embed_0.diff"] = torch.ones(128, 32)
    found = read(sdxl, tensors)
    kinds = {member.target.path: type(member.adapter).__name__ for member in found}
    assert kinds["input_blocks.1.0.in_layers.0"] == kinds["time_embed.0"] == Difference.__name__
    assert sorted(set(kinds.values())) == ["Difference", "LoKr", "LoRA"]
    assert_same(
        [m for m in found if not isinstance(m.adapter, Difference)],
        sorted([*first, *second], key=lambda m: list(kinds).index(m.target.path)),
    )


def test_members_come_in_the_order_of_the_table_whatever_the_file_has(sdxl):
    members = sdxl.members()
    tensors = spelt(members, TOOLS["kohya"])
    assert_same(read(sdxl, dict(reversed(list(tensors.items())))), members)


def test_a_text_encoder_that_is_not_at_hand_is_left_out_and_said(sdxl, caplog: pytest.LogCaptureFixture):
    members = sdxl.members(part=None)
    alone = SimpleNamespace(naming=sdxl.naming, parts=sdxl.parts[:2])
    with caplog.at_level(logging.WARNING, logger="hadron"):
        found = read(alone, spelt(members, TOOLS["diffusers"]))
    assert {member.part.name for member in found} == {"unet", "text encoder 1"}
    assert "18 adapters are left out: no text encoder was given for text_encoder_2." in caplog.text and len(caplog.records) == 1


# Errors


def good(sdxl) -> dict[str, Tensor]:
    return spelt(sdxl.members(only="input_blocks.3.1.proj_in"), TOOLS["kohya"])


ONE, MANY = torch.ones(()), torch.ones(2)
BOTH_ENCODERS = "base_model.model.text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            {"lora_unet_blocks_0_mlp_layer1.alpha": ONE},
            "seems to be for Anima: .* for layers that this SDXL model has not: lora_unet_blocks_0",
        ),
        ({"lora_unet_input_blocks_9_9_x.alpha": ONE}, "1 of 2 adapters are for layers that this SDXL model has not"),
        ({"lora_unet_out_2.oft_blocks": MANY}, "lora_unet_out_2 holds oft_blocks, which is not LoHa"),
        ({"unet.conv_out.lora_B.bias": MANY}, "holds lora_B.bias, which is not"),
        ({"lora_unet_out_2.alpha": ONE}, "lora_unet_out_2 holds alpha, which is not"),
        ({"lone": MANY}, "not an adapter: lone is not of the form <name>.<parameter>"),
        ({"lora_unet_out_2.diff": torch.ones(3, 3)}, r"lora_unet_out_2.diff has the shape \[3, 3\]; \[4, 32, 3, 3\] was expected"),
        ({"lora_unet_out_2.hada_t1": torch.ones(2, 2, 3, 3)}, "lora_unet_out_2: the file lacks hada_w1_b"),
        ({f"{BOTH_ENCODERS}.alpha": ONE}, "1 names may be of several layers: base_model.*lora_te1_.* or lora_te2_"),
        ({"lora_unet_out_2.diff": MANY, "lora_unet_out_2.lora_up.weight": MANY}, "holds tensors of LoRA and difference at once"),
    ],
)
def test_what_is_not_understood_is_refused_by_name_or_skipped_with_a_warning(
    sdxl, extra: dict[str, Tensor], words: str, caplog: pytest.LogCaptureFixture
):
    tensors = good(sdxl) | extra
    with pytest.raises(ValueError, match=words):
        read(sdxl, tensors)
    with caplog.at_level(logging.WARNING, logger="hadron"):
        (found,) = read(sdxl, tensors, allow_partial=True)
    assert found.target.path == "input_blocks.3.1.proj_in"
    (record,) = caplog.records
    assert "only a part of it is used" in record.getMessage()


def test_all_problems_are_raised_together(sdxl):
    wrong = {"lora_unet_nothing.alpha": ONE, "lone": MANY, "lora_unet_out_2.diff": MANY, "lora_unet_time_embed_0.x": MANY}
    with pytest.raises(ValueError) as caught:
        read(sdxl, good(sdxl) | wrong)
    assert all(key.partition(".")[0] in str(caught.value) for key in wrong)


def test_a_layer_named_twice_is_refused(sdxl):
    members = sdxl.members(only="input_blocks.3.1.proj_in")
    tensors = spelt(members, TOOLS["kohya"]) | spelt(members, TOOLS["diffusers"])
    with pytest.raises(ValueError, match=r"two spellings of the same layer: lora_unet_\S+ and unet\.\S+"):
        read(sdxl, tensors)


def test_two_adapters_in_one_file_are_refused(sdxl):
    members = sdxl.members(only="input_blocks.3.1.proj_in")
    tensors = spelt(members, TOOLS["PEFT"], lambda m: peft_values(m, "one") | peft_values(m, "two"))
    with pytest.raises(ValueError, match=r"a second tensor for the same parameter: .*lora_A.two.weight"):
        read(sdxl, tensors)
    assert_same(read(sdxl, spelt(members, TOOLS["PEFT"], lambda m: peft_values(m, "one") | {"alpha": m.adapter.alpha})), members)


def test_nothing_for_these_models_is_an_error_even_if_a_part_is_enough(sdxl):
    with pytest.raises(ValueError, match="1 of 1 adapters are for layers that this SDXL model has not: lora_unet_nothing"):
        read(sdxl, {"lora_unet_nothing.alpha": torch.ones(())}, allow_partial=True)


def test_another_kind_of_file_is_told(sdxl):
    with pytest.raises(ValueError, match="not an adapter that can be read: it holds tensors such as conv.weight, conv.bias"):
        read(sdxl, {"conv.weight": torch.ones(2), "conv.bias": torch.ones(2)})


def test_errors_name_the_file(sdxl, tmp_path):
    file = AdapterFile(tensors={"lone": torch.ones(2)}, path=tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors: .*lone"):
        read_members(file, sdxl.naming, sdxl.parts)


# Details of values


def test_magnitudes_of_peft_stand_on_the_outputs_even_of_a_square_convolution():
    from one_layer import read_one

    layer = nn.Conv2d(6, 6, 3)
    tensors = {"lora_A.weight": torch.randn(2, 6, 3, 3), "lora_B.weight": torch.randn(6, 2, 1, 1)}
    stored = {f"base_model.model.m.{key}": value for key, value in tensors.items()}
    adapter = read_one(layer, stored | {"base_model.model.m.lora_magnitude_vector": torch.rand(1, 6, 1, 1)})
    assert adapter.dora_scale is not None and adapter.dora_scale.shape == (6, 1, 1, 1)


def test_a_whole_second_factor_of_pefts_conv1d_is_refused_with_the_reason():
    from one_layer import read_one

    tensors = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(8, 6, 3)}
    layer = nn.Conv1d(12, 16, 3)
    with pytest.raises(ValueError, match=r"base_model.model.m.lokr_w2: PEFT mixes up the indices"):
        read_one(layer, {f"base_model.model.m.{key}": value for key, value in tensors.items()})
    assert read_one(layer, {f"lora_unet_m.{key}": value for key, value in tensors.items()}).delta_weight().shape == (16, 12, 3)


def test_half_and_eight_bit_floats_are_read_as_float32():
    from one_layer import read_one

    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        tensors = {"lora_down.weight": torch.randn(2, 4).to(dtype), "lora_up.weight": torch.randn(3, 2).to(dtype)}
        adapter = read_one(nn.Linear(4, 3), {f"lora_unet_m.{key}": value for key, value in tensors.items()})
        torch.testing.assert_close(adapter.delta_weight(), tensors["lora_up.weight"].float() @ tensors["lora_down.weight"].float())


def test_both_families_are_there():
    assert [naming_named(name).title for name in ("anima", "sdxl")] == ["Anima", "SDXL"]


def test_layers_of_one_shape_are_rehearsed_once(sdxl, monkeypatch: pytest.MonkeyPatch):
    members, rehearsed = sdxl.members(only="attn"), []
    monkeypatch.setattr(reader, "_rehearse", lambda algorithm, name, layer, tensors: rehearsed.append(LayerShape.of(layer)))
    assert_same(read(sdxl, spelt(members, TOOLS["kohya"])), members)
    assert len(rehearsed) == len(set(rehearsed)) == len({member.adapter.shape for member in members}) < len(members)
