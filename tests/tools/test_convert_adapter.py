"""tools.convert_adapter: what it writes, prints and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_adapters import ALGORITHMS, write_adapter

from library.core.options import OptionError
from library.core.tensor_file import load_tensors, read_header
from networks.network import Network
from networks.open_file import open_adapter
from tools.convert_adapter import main


def assert_same(path: Path, network: Network, base: Path, limit: float = 1e-5) -> None:
    """The file means what the network does."""
    found = open_adapter(path, family="sdxl", base=base)
    assert [member.target for member in found.members] == [member.target for member in network.members]
    for one, two in zip(found.adapters, network.adapters, strict=True):
        expected = two.delta_weight().detach()
        assert float((one.direction().detach() - expected).norm()) <= limit * float(expected.norm())


@pytest.mark.parametrize("target", ["kohya", "comfyui", "lycoris", "peft", "diffusers"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_goes_to_every_tool(
    algorithm: str, target: str, small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    network = write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, algorithm)
    out = tmp_path / ("b" if target == "peft" else "b.safetensors")
    main([str(tmp_path / "a.safetensors"), str(out), "--to", target, "--base", str(small_sdxl_file)])
    assert_same(out, network, small_sdxl_file)
    printed = capsys.readouterr().out
    assert f"uses all {sum(len(load_tensors(file)) for file in (out.rglob('*.safetensors') if out.is_dir() else [out]))} keys" in printed
    assert (f"{network.adapters[0].title} as LoRA" in printed) == (target == "diffusers" and algorithm != "lora")
    assert f"wrote {out}: " in printed


def test_a_dora_becomes_a_lora_with_the_base_model(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    network = write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lokr", dora_wd=True)
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--base", str(small_sdxl_file), "--to"]
    with pytest.raises(ValueError, match="--to kohya: sd-scripts cannot be told DoRA"):
        main([*words, "kohya"])
    main([*words, "kohya", "--as_lora"])
    assert_same(tmp_path / "b.safetensors", network, small_sdxl_file)


def test_truncation_lists_the_worst_layers(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "loha")
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "comfyui", "--base", str(small_sdxl_file)]
    main([*words, "--as_lora", "--rank", "2"])
    printed = capsys.readouterr().out
    assert "worst layers" in printed and "LoHa as LoRA" in printed
    assert {adapter.rank for adapter in open_adapter(tmp_path / "b.safetensors", base=small_sdxl_file).adapters} == {2}


def test_half_precision_is_kept_where_it_holds_every_number(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "loha", torch.float16)
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--base", str(small_sdxl_file), "--to"]
    main([*words, "comfyui"])
    assert {info.dtype for info in read_header(tmp_path / "b.safetensors").tensors.values()} == {"F16", "F32"}  # F32: alphas
    main([*words, "diffusers"])
    assert {info.dtype for info in read_header(tmp_path / "b.safetensors").tensors.values()} == {"F32"}
    main([*words, "diffusers", "--precision", "bf16"])
    assert {info.dtype for info in read_header(tmp_path / "b.safetensors").tensors.values()} == {"BF16"}
    assert read_header(tmp_path / "b.safetensors").metadata["ss_output_name"] == "style"


def test_peft_configs_say_what_the_file_did_not(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lokr", factor=4)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b"), "--to", "peft", "--base", str(small_sdxl_file)])
    config = json.loads((tmp_path / "b" / "unet" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"], config["decompose_factor"]) == ("LOKR", 2, 1, 4)


def test_wrong_options_are_named_at_once(tmp_path: Path):
    with pytest.raises(OptionError) as caught:
        main([str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors"), "--to", "peft", "--rank", "0", "--dotted"])
    text = str(caught.value)
    for words in (
        "--dotted: only with --to comfyui",
        "--rank, --max_error: only with",
        "rank 0: must be at least 1",
        "writes a folder",
        "would replace",
    ):
        assert words in text


def test_an_unknown_tool_is_named(tmp_path: Path):
    with pytest.raises(OptionError, match="unknown choice 'comfy'; did you mean 'comfyui'"):
        main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "comfy"])


def test_magnitudes_rescaled_for_comfyui_are_read_back_on_a_model(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path
):
    network = write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lora", dora_wd=True)
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "comfyui", "--base", str(small_sdxl_file)]
    main(words)
    encoders = [small_sdxl_modules.text_encoder_1, small_sdxl_modules.text_encoder_2]
    again = Network.from_file(tmp_path / "b.safetensors", small_sdxl_modules.unet, encoders)
    for one, two in zip(again.adapters, network.adapters, strict=True):
        torch.testing.assert_close(one.delta_weight(), two.delta_weight(), rtol=1e-4, atol=1e-6)
    plain = load_tensors(tmp_path / "a.safetensors")
    name = next(key for key in plain if key.endswith("dora_scale"))
    assert not torch.allclose(load_tensors(tmp_path / "b.safetensors")[name], plain[name], rtol=1e-5)
    main([*words, "--keep_magnitudes"])
    assert torch.equal(load_tensors(tmp_path / "b.safetensors")[name], plain[name])


def test_without_the_weights_rescaled_magnitudes_are_said(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lora", dora_wd=True)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "comfyui", "--base", str(small_sdxl_file)])
    open_adapter(tmp_path / "b.safetensors", base=small_sdxl_file)
    assert "its DoRA magnitudes were rescaled for ComfyUI" in capsys.readouterr().err


def test_whole_factors_are_scaled_on_request(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path):
    network = write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lokr", full_matrix=True)
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya", "--base", str(small_sdxl_file)]
    main([*words, "--scale_whole", "0.25"])
    found = open_adapter(tmp_path / "b.safetensors", base=small_sdxl_file)
    torch.testing.assert_close(found.adapters[0].delta_weight(), 0.25 * network.adapters[0].delta_weight())
    write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lora")
    with pytest.raises(ValueError, match=r"--scale_whole 0.25: the adapter has no LoKr layer"):
        main([*words, "--scale_whole", "0.25"])
