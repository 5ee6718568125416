"""PEFT's folders: scales by its patterns, folders of components, and configurations that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import relative_error
from one_layer import read_one
from spelt import assert_same, peft_values, read, spelt
from torch import nn

from library.core.tensor_file import save_tensors
from networks.files import AdapterFile, read_adapter_file
from networks.formats.peft_config import PeftConfig, read_config, read_metadata


def config(**changes: Any) -> PeftConfig:
    return PeftConfig.of({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes, "adapter_config.json")


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1.5} | settings))
    return folder


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert config().scale("a.b") == 2
    assert config(use_rslora=True).scale("a.b") == 4
    assert config(peft_type="LOHA", alpha=1, lora_alpha=None).scale("a.b") == 0.25
    assert config(peft_type="PeftType.LORA").scale("a.b") == 2


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("to_q", True),
        ("attn1.to_q", True),
        ("blocks.0.attn1.to_q", True),
        ("o_q", False),
        ("attn1", False),
        (r".*\.0\..*", True),
        (r"blocks\.[12]\.attn1\.to_q", False),
        ("^blocks.0.attn1.to_q", True),
    ],
)
def test_patterns_are_a_path_or_its_end_as_in_peft(pattern: str, matches: bool):
    other = pytest.importorskip("peft.utils.other")
    path = "blocks.0.attn1.to_q"
    assert config(alpha_pattern={pattern: 40}).scale(path) == (10 if matches else 2)
    assert other.get_pattern_key([pattern], path) == (pattern if matches else path)


def test_ranks_have_patterns_too():
    assert config(rank_pattern={"to_q": 8}, alpha_pattern={"to_k": 2}).scale("a.to_q") == 1
    assert config(rank_pattern={"to_q": 8}, alpha_pattern={"to_k": 2}).scale("a.to_k") == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3: only LORA, LOHA, LOKR are read"),
        ({"r": 0}, "r: 0 is not a positive number"),
        ({"r": "4"}, "r: '4' is not a positive number"),
        ({"r": True}, "r: True is not"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf is not"),
        ({"r": [[[4]]]}, "r: .* is not a positive number"),
        ({"rank_pattern": [1]}, r"rank_pattern: \[1\] is not a table"),
        ({"alpha_pattern": {"a": "b"}}, "alpha_pattern 'a'.*: 'b' is not a positive number"),
        ({"alpha_pattern": {"(a": 1}}, "the pattern '\\(a' is not a regex"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "too intricate to be matched safely"),
        ({"alpha_pattern": {".*.*.*.*.*.*.*x": 1}}, "too intricate"),
        ({"alpha_pattern": {"x" * 500: 1}}, "too intricate"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4: the adapter is of changed base weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: this variant is not read"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{words}"):
        config(**changes)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 100_000, '{"r": 1e999}', '{"r": NaN}'])
def test_a_configuration_that_is_no_table_is_refused(text: str):
    with pytest.raises(ValueError, match=r"adapter_config.json: "):
        read_config(text, "adapter_config.json")


def test_metadata_has_a_configuration_a_component():
    found = read_metadata(
        json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.r": 2, "text_encoder.lora_alpha": 2, "note": 1}), "m"
    )
    assert {name: one.scale("x") for name, one in found.items()} == {"unet": 0.5, "text_encoder": 1.0}


# Folders


def test_a_folder_is_read_with_the_alphas_of_its_configuration(sdxl, tmp_path: Path):
    members = sdxl.members(only="attn1")
    exception = members[0].target.module_path
    members[0].adapter.set_alpha(9)
    tensors = spelt(members, lambda m: f"base_model.model.{m.target.module_path}", peft_values)
    assert_same(read(sdxl, read_adapter_file(write(tmp_path / "a", tensors, alpha_pattern={exception: 9}))), members)


def test_a_folder_may_hold_a_pickle_of_tensors(sdxl, tmp_path: Path):
    members = sdxl.members(only="attn1")
    folder = write(tmp_path / "a", {"x": torch.ones(1)})
    (folder / "adapter_model.safetensors").unlink()
    torch.save(spelt(members, lambda m: f"base_model.model.{m.target.module_path}", peft_values), folder / "adapter_model.bin")
    assert_same(read(sdxl, read_adapter_file(folder)), members)


def test_folders_of_components_are_read_together(sdxl, tmp_path: Path):
    members = sdxl.members(part=None, only="0")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        own = [member for member in members if member.target.diffusers_path.partition(".")[0] == component]
        write(tmp_path / component, spelt(own, lambda m: f"base_model.model.{m.target.module_path}", peft_values))
    assert_same(read(sdxl, read_adapter_file(tmp_path)), members)


def test_a_diffusers_folder_is_read(sdxl, tmp_path: Path):
    members = sdxl.members(only="attn1")
    save_tensors(tmp_path / "pytorch_lora_weights.safetensors", spelt(members, lambda m: m.target.diffusers_path))
    assert_same(read(sdxl, read_adapter_file(tmp_path)), members)


def test_folders_that_lack_something_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a folder without adapter_config.json \(PEFT\) and without pytorch_lora_weights.safetensors"):
        read_adapter_file(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"adapter_config.json: not UTF-8 text"):
        read_adapter_file(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    with pytest.raises(ValueError, match=r"has adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin"):
        read_adapter_file(tmp_path)


def test_a_whole_lokr_of_peft_keeps_its_scale_in_the_first_factor():
    tensors = {"base_model.model.m.lokr_w1": torch.randn(2, 2), "base_model.model.m.lokr_w2": torch.randn(6, 4)}
    adapter = read_one(nn.Linear(8, 12), tensors, {"peft_type": "LOKR", "r": 4, "alpha": 1})
    expected = torch.kron(*tensors.values()) / 4
    torch.testing.assert_close(adapter.delta_weight(), expected)


# Written by PEFT itself


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(12, 8)
        self.other = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoraConfig", {"r": 3, "lora_alpha": 2}),
        ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_rslora": True}),
        ("LoraConfig", {"r": 3, "lora_alpha": 2, "rank_pattern": {"m": 5}, "alpha_pattern": {"m": 7}}),
        ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_dora": True}),
        ("LoHaConfig", {"r": 3, "alpha": 2}),
        ("LoKrConfig", {"r": 2, "alpha": 1, "decompose_both": True}),
        ("LoKrConfig", {"r": 50, "alpha": 3, "decompose_factor": 4}),
    ],
)
def test_a_folder_saved_by_peft_means_what_it_means_there(tmp_path: Path, kind: str, settings: dict[str, Any]):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Two()
    weight = base.m.weight.detach().clone()
    model = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["m"], **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().m.weight
    layer = nn.Linear(12, 8)
    layer.weight.data.copy_(weight)
    file: AdapterFile = read_adapter_file(tmp_path)
    adapter = read_one(layer, dict(file.tensors), json.loads((tmp_path / "adapter_config.json").read_text()))
    assert relative_error(adapter.delta_weight(), merged - weight) < 1e-5
