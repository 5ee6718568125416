"""Exports: what each tool is told, what it cannot be told, and what is checked before anything counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import filled, relative_error
from export_cases import CASES, NAME, case_named, network_of, own_tensors
from other_readers import comfyui, sd_scripts
from torch import nn

from library.core.tensor_file import read_header
from networks.difference import Difference
from networks.export import WRITERS, Export, Wishes, export, ignored_keys, judged, narrowed, write_export
from networks.files import read_adapter_file
from networks.formats.reader import read_members
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.members import Member
from networks.network import Network

AS_LORA = Wishes(as_lora=True)


def small_network(small: Any, algorithm: str = "lora", part: int | None = 0, **arguments: Any) -> Network:
    return Network(small.members(algorithm, part=part, **arguments), small.naming, small.parts)


def lokr_on(layer: nn.Module, rank: int = 2, **arguments: Any) -> LoKr:
    adapter = filled(LoKr.fresh(NAME, layer.requires_grad_(False), rank, 1.5, LoKr.Arguments(**arguments)))
    assert isinstance(adapter, LoKr)
    return adapter


def difference(layer: nn.Module, **tensors: torch.Tensor) -> Difference:
    return Difference.from_tensors(NAME, layer, tensors)


# What readers compute


@pytest.mark.parametrize("key", CASES)
def test_comfyui_computes_the_same(key: str):
    adapter, _ = case_named(key)
    weight = adapter.layer.get_parameter("weight")
    found = comfyui(weight, own_tensors(export(network_of(adapter), "comfyui").tensors))
    assert relative_error(found - weight, adapter.delta_weight()) < 2e-5


@pytest.mark.parametrize("key", [key for key in CASES if key.endswith("dora-conv3x3")])
def test_comfyui_scales_a_dora_as_a_whole_at_every_strength(key: str):
    adapter, _ = case_named(key)
    weight = adapter.layer.get_parameter("weight")
    found = comfyui(weight, own_tensors(export(network_of(adapter), "comfyui").tensors), strength=0.3)
    assert relative_error(found - weight, 0.3 * adapter.delta_weight()) < 5e-5


@pytest.mark.parametrize(
    "key", [key for key in CASES if not any(word in key for word in ("dora", "all", "1d", "3d", "grouped", "unbalanced"))]
)
def test_sd_scripts_computes_the_same(key: str):
    adapter, _ = case_named(key)
    exported = export(network_of(adapter), "kohya")
    arguments = json.loads(exported.metadata.get("ss_network_args", "{}"))
    tensors = own_tensors(exported.tensors)
    has_cores = any(name.startswith(("hada_t", "lokr_t")) for name in tensors)
    found = sd_scripts(adapter.layer, tensors, factor=int(arguments.get("factor", -1)), use_tucker=has_cores)
    assert relative_error(found, adapter.delta_weight()) < 1e-5


@pytest.mark.parametrize("factor", [2, 3, 4, 6, 7])
def test_the_factor_of_sd_scripts_is_found(factor: int):
    adapter = lokr_on(nn.Linear(28, 24), factor=factor)
    exported = export(network_of(adapter), "kohya")
    arguments = json.loads(exported.metadata.get("ss_network_args", "{}"))
    found = sd_scripts(adapter.layer, own_tensors(exported.tensors), factor=int(arguments.get("factor", -1)))
    assert relative_error(found, adapter.delta_weight()) < 1e-5
    assert exported.hints == ([f"sd-scripts reads this file with --network_args factor={arguments['factor']}"] if arguments else [])


# What cannot be told


@pytest.mark.parametrize(
    ("key", "target", "reason"),
    [
        ("LoRA-dora-conv3x3", "kohya", "DoRA, which sd-scripts ignores; --as_lora with --base bakes it into a LoRA, --to lycoris keeps it"),
        ("LoHa-2-conv1d", "kohya", "Conv1d, Conv3d or grouped convolutions, which sd-scripts does not adapt"),
        ("LoKr-dora-in-conv3x3", "lycoris", "DoRA over the inputs, which LyCORIS saves but takes for one over the outputs"),
        ("LoKr-8-conv1d", "peft", "LoKr with a whole second factor on Conv1d, whose indices PEFT mixes up; add --as_lora"),
        ("LoKr-dora-conv3x3", "peft", "DoRA on LoHa or LoKr, which PEFT has not"),
        ("LoRA-2-conv3x3-grouped", "diffusers", "grouped convolutions, for which PEFT's LoRA means something else"),
    ],
)
def test_what_a_tool_cannot_be_told_is_refused_with_the_reason(key: str, target: str, reason: str):
    with pytest.raises(ValueError) as caught:
        export(network_of(case_named(key)[0]), target)
    assert f"--to {target}: {WRITERS[target].reader} cannot be told {reason}" in str(caught.value) and f"1 layer: {NAME}" in str(
        caught.value
    )


def test_dora_without_the_base_model_is_refused_with_the_option_to_give():
    adapter, _ = case_named("LoHa-dora-conv3x3")
    adapter.layer.to("meta")
    with pytest.raises(ValueError, match="divides by the norm of the base weight; add --base with the checkpoint"):
        export(network_of(adapter), "comfyui")
    with pytest.raises(ValueError, match="only with the weights that it rescales; add --base"):
        export(network_of(adapter), "diffusers")
    assert export(network_of(adapter), "lycoris").errors == {NAME: 0.0}


def test_all_reasons_are_given_at_once(sdxl: Any):
    members = [*sdxl.members("lora", only="attn1.to_q", dora_wd=True), *sdxl.members("loha", only="attn1.to_k")]
    shapeless = sdxl.naming.outside(*sdxl.parts[0])[0]
    layer = sdxl.parts[0][1].get_submodule(shapeless.module_path)
    members.append(
        Member(adapter=filled(LoRA.fresh(shapeless.name, layer, 2, 1.0, LoRA.Arguments())), part=sdxl.parts[0][0], target=shapeless)
    )
    with pytest.raises(ValueError) as caught:
        export(Network(members, sdxl.naming, sdxl.parts), "kohya")
    assert "DoRA, which sd-scripts ignores" in str(caught.value) and "layers that sd-scripts does not adapt" in str(caught.value)


def test_two_algorithms_in_one_file_are_refused_where_a_reader_takes_one(sdxl: Any):
    members = [*sdxl.members("lora", only="attn1.to_q"), *sdxl.members("loha", only="attn1.to_k")]
    network = Network(members, sdxl.naming, sdxl.parts)
    for target in ("kohya", "peft"):
        with pytest.raises(ValueError, match="LoRA and LoHa in one .*; add --as_lora"):
            export(network, target)
        assert max(export(network, target, wishes=AS_LORA).errors.values()) < 1e-5
    assert export(network, "comfyui").notes == {}


def test_layers_that_cannot_be_told_are_left_out_when_that_is_asked_for(anima: Any, caplog: pytest.LogCaptureFixture):
    network = small_network(anima, part=None)
    with pytest.raises(ValueError, match="layers of the text encoder for which diffusers loads no LoRA"):
        export(network, "diffusers")
    exported = export(network, "diffusers", wishes=Wishes(allow_partial=True))
    assert {key.split(".")[0] for key in exported.tensors} == {"transformer", "text_conditioner"}
    assert "left out: layers of the text encoder" in caplog.text and len(exported.left_out) == 1


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="unknown target 'comfy'; did you mean 'comfyui'"):
        export(network_of(case_named("LoRA-2-linear")[0]), "comfy")


# Names


def names_of(exported: Export) -> set[str]:
    return {key.rsplit(".", 2)[0] if key.endswith(".weight") else key.rsplit(".", 1)[0] for key in exported.tensors}


def test_each_tool_gets_its_own_names_of_anima(anima: Any):
    members = [*anima.members(only="blocks.0.self_attn.q_proj"), *anima.members(part=1, only="layers.0.self_attn.q_proj")]
    network = Network(members, anima.naming, anima.parts)
    dit = {"blocks_0_self_attn_q_proj", "llm_adapter_blocks_0_self_attn_q_proj"}
    text = "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj"
    flat = {f"lora_unet_{name}" for name in dit}
    assert names_of(export(network, "kohya")) == {*flat, "lora_te_layers_0_self_attn_q_proj"}
    assert names_of(export(network, "lycoris")) == {*flat, "lora_te1_layers_0_self_attn_q_proj"}
    assert names_of(export(network, "comfyui")) == {*flat, text}
    dotted = export(network, "comfyui", wishes=Wishes(dotted=True))
    assert names_of(dotted) == {"diffusion_model.blocks.0.self_attn.q_proj", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj", text}
    assert set(export(network, "peft").files) == {"transformer", "text_conditioner", "text_encoder"}


def test_norms_of_text_encoders_have_the_names_that_comfyui_knows(sdxl: Any):
    part, encoder = sdxl.parts[1]
    target = next(target for target in sdxl.naming.outside(part, encoder) if target.path.endswith("layers.0.layer_norm1"))
    layer = encoder.get_submodule(target.module_path)
    adapter = Difference.from_tensors(
        target.name, layer, {"w_norm": torch.randn(layer.weight.shape), "b_norm": torch.randn(layer.bias.shape)}
    )
    exported = export(Network([Member(adapter=adapter, part=part, target=target)], sdxl.naming, sdxl.parts), "comfyui")
    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1"
    assert set(exported.tensors) == {f"{name}.w_norm", f"{name}.b_norm"}


def test_standalone_names_are_for_one_model(sdxl: Any):
    wishes = Wishes(standalone=True)
    exported = export(small_network(sdxl, only="input_blocks.3.1.proj_in"), "lycoris", wishes=wishes)
    assert names_of(exported) == {"lycoris_down_blocks_1_attentions_0_proj_in"}
    with pytest.raises(ValueError, match="text encoders, which LyCORIS' wrapper of one model does not reach"):
        export(small_network(sdxl, part=None), "lycoris", wishes=wishes)


# Differences


def test_whole_differences_stay_where_they_are_read_and_become_a_lora_elsewhere():
    layer = nn.Linear(12, 18)
    network = network_of(difference(layer, diff=torch.randn(18, 12)))
    for target in ("comfyui", "lycoris"):
        assert set(export(network, target).tensors) == {f"{NAME}.diff"}
    with pytest.raises(ValueError, match="whole differences, which sd-scripts does not read; add --as_lora"):
        export(network, "kohya")
    for target in WRITERS:
        assert export(network, target, wishes=AS_LORA).errors[NAME] < 1e-5


def test_a_difference_of_a_bias_is_kept_or_refused():
    network = network_of(difference(nn.Linear(12, 18), diff_b=torch.randn(18)))
    assert set(export(network, "comfyui").tensors) == {f"{NAME}.diff_b"}
    exported = export(network, "lycoris")
    assert set(exported.tensors) == {f"{NAME}.diff", f"{NAME}.diff_b"} and not exported.tensors[f"{NAME}.diff"].any()
    with pytest.raises(
        ValueError, match="differences of norms and biases, which no LoRA can hold; --to comfyui and --to lycoris keep them"
    ):
        export(network, "kohya", wishes=AS_LORA)


def test_lycoris_reads_differences():
    modules = pytest.importorskip("lycoris.modules")
    layer = nn.Linear(12, 18)
    exported = export(network_of(difference(layer, diff_b=torch.randn(18))), "lycoris")
    kind, parameters = modules.get_module(exported.tensors, NAME)
    module = modules.make_module(kind, parameters, NAME, layer)
    x = torch.randn(2, 12)
    torch.testing.assert_close(module(x) - layer(x), exported.tensors[f"{NAME}.diff_b"].expand(2, 18), rtol=1e-4, atol=1e-5)


# Rewriting


def test_a_whole_lokr_that_lycoris_would_split_otherwise_becomes_what_is_smaller():
    wide = lokr_on(nn.Linear(64, 48), unbalanced_factorization=True, full_matrix=True)
    assert export(network_of(wide), "lycoris").notes == {"LoKr as whole difference": 1}
    low = lokr_on(nn.Linear(64, 48), unbalanced_factorization=True)
    assert export(network_of(low), "lycoris").notes == {"LoKr as LoRA": 1}


def test_a_rank_that_readers_take_for_whole_is_multiplied_out():
    layer = nn.Linear(24, 24).requires_grad_(False)
    tensors = {"lokr_w1": torch.randn(4, 4), "lokr_w2_a": torch.randn(6, 5), "lokr_w2_b": torch.randn(5, 6), "alpha": torch.tensor(2.0)}
    network = network_of(LoKr.from_tensors(NAME, layer, tensors))
    for target in ("kohya", "lycoris", "peft"):
        assert export(network, target).notes == {"LoKr's second factor multiplied out": 1}


def test_truncation_says_what_it_costs():
    network = network_of(lokr_on(nn.Linear(24, 24), factor=4))
    exported = export(network, "diffusers", wishes=Wishes(rank=3))
    (entry,) = exported.entries
    assert entry.adapter.rank == 3 and 0.1 < exported.errors[NAME] < 0.9
    assert exported.errors[NAME] == pytest.approx(entry.error, rel=1e-3)


def test_a_scale_that_is_a_power_of_two_is_folded_without_rounding():
    layer = nn.Linear(12, 18)
    tensors = {"lora_down.weight": torch.randn(4, 12), "lora_up.weight": torch.randn(18, 4), "alpha": torch.tensor(0.5)}
    exported = export(network_of(LoRA.from_tensors(NAME, layer, tensors)), "diffusers")
    assert torch.equal(exported.tensors["unet.m.lora_B.weight"] * 4, tensors["lora_up.weight"])
    assert torch.equal(exported.tensors["unet.m.lora_A.weight"] * 2, tensors["lora_down.weight"])


def test_ranks_and_alphas_that_differ_are_patterns_of_one_layer_each(sdxl: Any):
    members = [*sdxl.members(only="attn1.to_q"), *sdxl.members(only="attn1.to_out.0", rank=4)]
    config = export(Network(members, sdxl.naming, sdxl.parts), "peft").files[""].config
    assert config is not None and config["r"] == 2 and config["lora_alpha"] == 1.5 and set(config["rank_pattern"].values()) == {4}
    assert all(pattern.startswith("^") and r"\.to_out\.0" in pattern for pattern in config["rank_pattern"])
    assert config["target_modules"] == sorted(member.target.diffusers_path.removeprefix("unet.") for member in members)


# Checks


@pytest.mark.parametrize("target", WRITERS)
def test_a_foreign_key_is_found(sdxl: Any, target: str):
    network = small_network(sdxl, part=None)
    exported = export(network, target)
    keys = [key for file in exported.files.values() for key in file.tensors]
    assert ignored_keys(target, keys, network) == []
    foreign = ["lora_unet_input_blocks_99_1_proj_in.alpha", f"{keys[0]}_", f"net.{keys[0]}", "alpha"]
    assert ignored_keys(target, [*keys, *foreign], network) == foreign


def test_a_loss_that_may_not_be_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "networks.formats.export.comfyui.without_core",
        lambda entry: entry.remade({**entry.adapter.file_tensors(), "alpha": torch.tensor(1.6)}, "wrong"),
    )
    with pytest.raises(ValueError, match=rf"layers lose more than they may, relative to their change: {NAME} \(6.7e-02\)"):
        export(network_of(case_named("LoRA-2-linear")[0]), "comfyui")


def test_values_too_large_for_the_precision_are_refused():
    adapter, _ = case_named("LoRA-2-linear")
    with torch.no_grad():
        adapter.get_parameter("lora_up.weight").fill_(1e6)
    with pytest.raises(ValueError, match=r"1 tensors hold values that are not finite in this precision: lora_unet_m.lora_up.weight"):
        export(network_of(adapter), "kohya", dtype=torch.float16)


def test_alphas_and_magnitudes_stay_float32():
    exported = export(network_of(case_named("LoRA-dora-conv3x3")[0]), "lycoris", dtype=torch.bfloat16)
    dtypes = {key.removeprefix(f"{NAME}."): tensor.dtype for key, tensor in exported.tensors.items()}
    assert dtypes["alpha"] == dtypes["dora_scale"] == torch.float32 and dtypes["lora_up.weight"] == torch.bfloat16


def test_narrowing_is_done_only_without_loss():
    adapter, _ = case_named("LoRA-2-linear")
    exported = export(network_of(adapter), "kohya")
    assert narrowed(exported, torch.float16) is exported
    short = narrowed(export(network_of(adapter), "kohya", dtype=torch.float16), torch.float16)
    assert short.tensors[f"{NAME}.lora_up.weight"].dtype == torch.float16


def test_a_file_rescaled_for_comfyui_is_not_exported_again(tmp_path: Path):
    adapter, _ = case_named("LoRA-dora-conv3x3")
    write_export(tmp_path / "a.safetensors", export(network_of(adapter), "comfyui"))
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert metadata["dora_norm"] == "base weight"
    with pytest.raises(ValueError, match="rescaled for ComfyUI; export the file that it was made from"):
        export(network_of(adapter), "lycoris", metadata=metadata)


def test_a_file_rescaled_for_comfyui_is_loaded_into_a_network_as_it_was_meant(tmp_path: Path):
    adapter, _ = case_named("LoRA-dora-conv3x3")
    write_export(tmp_path / "a.safetensors", export(network_of(adapter), "comfyui"))
    twin, _ = case_named("LoRA-dora-conv3x3")
    with torch.no_grad():
        twin.get_parameter("dora_scale").zero_()
    network_of(twin).load_weights(tmp_path / "a.safetensors")
    torch.testing.assert_close(twin.delta_weight(), adapter.delta_weight())


# Files


def test_metadata_is_kept_as_far_as_it_still_holds(tmp_path: Path):
    given = {
        "ss_output_name": "style",
        "ss_network_dim": "7",
        "ss_network_args": '{"factor": "4"}',
        "sshs_model_hash": "old",
        "lora_adapter_metadata": "{}",
    }
    network = network_of(lokr_on(nn.Linear(24, 24), factor=4))
    write_export(tmp_path / "a.safetensors", export(network, "comfyui", metadata=given))
    kept = read_header(tmp_path / "a.safetensors").metadata
    assert kept["ss_output_name"] == "style" and kept["ss_network_dim"] == "2" and json.loads(kept["ss_network_args"]) == {"factor": "4"}
    assert kept["sshs_model_hash"] != "old" and "lora_adapter_metadata" not in kept
    told = export(network, "diffusers", metadata=given).metadata
    assert told == {"ss_output_name": "style"}
    write_export(tmp_path / "folder", export(network, "peft", metadata=given))
    assert read_adapter_file(tmp_path / "folder").metadata == {"ss_output_name": "style", "format": "pt"}


def test_a_peft_folder_is_replaced_as_a_whole(tmp_path: Path, sdxl: Any):
    folder = tmp_path / "adapter"
    write_export(folder, export(small_network(sdxl, part=None), "peft"))
    assert {path.name for path in folder.iterdir()} == {"unet", "text_encoder", "text_encoder_2"}
    write_export(folder, export(small_network(sdxl), "peft"))
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "all" / "mine").mkdir(parents=True)
    (tmp_path / "all" / "mine" / "adapter_config.json").touch()
    exported = export(network_of(case_named("LoRA-2-linear")[0]), "peft")
    for folder in ("photos", "all"):
        with pytest.raises(ValueError, match="holds more than one adapter's files"):
            write_export(tmp_path / folder, exported)
    with pytest.raises(ValueError, match="writes a folder"):
        write_export(tmp_path / "a.safetensors", exported)
    with pytest.raises(ValueError, match="writes a file"):
        write_export(tmp_path / "a.pt", export(network_of(case_named("LoRA-2-linear")[0]), "kohya"))


@pytest.mark.parametrize("target", WRITERS)
def test_what_was_written_is_read_again(sdxl: Any, target: str, tmp_path: Path):
    network = small_network(sdxl, "lokr", part=None, factor=4)
    path = tmp_path / ("a" if target == "peft" else "a.safetensors")
    write_export(path, export(network, target))
    found = read_members(read_adapter_file(path), sdxl.naming, sdxl.parts)
    assert [member.target for member in found] == [member.target for member in network.members]
    errors = [
        relative_error(one.adapter.delta_weight(), two.adapter.delta_weight()) for one, two in zip(found, network.members, strict=True)
    ]
    assert max(errors) < 1e-6


# Judging files


def test_a_native_file_is_judged_as_readers_are(sdxl: Any):
    network = small_network(sdxl, "loha", use_tucker=True)
    verdicts = {target: judged(target, list(network.file_tensors()), network) for target in WRITERS}
    assert not verdicts["kohya"].objections and not verdicts["lycoris"].objections
    assert verdicts["comfyui"].objections == ["rewriting is needed: Tucker core multiplied out"]
    assert verdicts["peft"].objections == ["it reads a folder with adapter_config.json"]
    assert verdicts["diffusers"].objections[0].endswith("LoHa as LoRA") and verdicts["diffusers"].objections[1].startswith("it ignores ")


@pytest.mark.parametrize("target", WRITERS)
def test_an_export_is_judged_readable_by_its_target(sdxl: Any, target: str):
    exported = export(small_network(sdxl, "lora"), target)
    keys = [key for file in exported.files.values() for key in file.tensors]
    network = Network(
        [Member(adapter=entry.adapter, part=entry.member.part, target=entry.member.target) for entry in exported.entries],
        sdxl.naming,
        sdxl.parts,
    )
    assert judged(target, keys, network, is_folder=target == "peft").objections == []


def test_a_missing_alpha_is_an_objection_of_readers_that_need_it():
    network = network_of(case_named("LoHa-2-linear")[0])
    keys = [key for key in network.file_tensors() if not key.endswith("alpha")]
    assert judged("kohya", keys, network).objections == [f"it fails without {NAME}.alpha"]
    assert judged("comfyui", keys, network).objections == []
