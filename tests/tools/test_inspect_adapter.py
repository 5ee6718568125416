"""tools.inspect_adapter: what it finds and says."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_adapters import write_adapter

from library.core.tensor_file import load_tensors, save_tensors
from tools.convert_adapter import main as convert
from tools.inspect_adapter import main


def test_a_file_is_described(small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "a.safetensors"
    network = write_adapter(path, small_sdxl_modules, "lokr", factor=4, dora_wd=True)
    main([str(path), "--base", str(small_sdxl_file), "--layers"])
    printed = capsys.readouterr().out
    assert f"{path}: SDXL, kohya (sd-scripts, LyCORIS), {path.stat().st_size:,} bytes" in printed
    assert f"{len(network.members)} layers, {sum(p.numel() for p in network.parameters()):,} parameters" in printed
    assert f"DoRA over outputs ({len(network.members)})" in printed and "w1 4x4 (" in printed
    assert "ss_output_name: style" in printed and all(member.target.name in printed for member in network.members)


def test_readers_are_listed_with_the_reason_and_the_command(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "a.safetensors"
    write_adapter(path, small_sdxl_modules, "lora", dora_wd=True)
    main([str(path), "--base", str(small_sdxl_file)])
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("  ")[0]: line for line in lines if line.startswith(("sd-scripts", "ComfyUI", "LyCORIS", "PEFT", "diffusers"))}
    assert "  yes" in found["LyCORIS"]
    assert "ComfyUI divides by the norm of the base weight" in found["ComfyUI"] and "DoRA, which sd-scripts ignores" in found["sd-scripts"]
    commands = [line for line in lines if line.startswith("python -m tools.convert_adapter")]
    base = f"--base {small_sdxl_file}"
    assert f"{path} {tmp_path / 'a-comfyui.safetensors'} --to comfyui {base}" in commands[1]
    assert commands[0].endswith(f"--to kohya {base} --as_lora") and commands[2].endswith(f"{tmp_path / 'a-peft'} --to peft {base}")
    convert(commands[1].split()[3:])  # it runs as it stands


@pytest.mark.parametrize("target", ["kohya", "comfyui", "lycoris", "peft", "diffusers"])
def test_an_export_is_readable_as_it_is(
    target: str, small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "lora")
    out = tmp_path / ("b" if target == "peft" else "b.safetensors")
    convert([str(tmp_path / "a.safetensors"), str(out), "--to", target, "--base", str(small_sdxl_file)])
    capsys.readouterr()
    main([str(out), "--base", str(small_sdxl_file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["readers"][target] == {"as_it_is": True, "objections": [], "hints": []}
    assert found["family"] == "sdxl" and set(found["algorithms"]) == {"LoRA"}


def test_norms_are_those_of_the_change(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    network = write_adapter(tmp_path / "a.safetensors", small_sdxl_modules, "loha")
    main([str(tmp_path / "a.safetensors"), "--base", str(small_sdxl_file), "--json", "--layers"])
    found = json.loads(capsys.readouterr().out)
    for layer, adapter in zip(found["layers"], network.adapters, strict=True):
        assert layer["norm"] == pytest.approx(adapter.delta_weight().norm().item(), rel=1e-4)
    assert found["metadata"]["ss_output_name"] == "style" and found["ranks"] == {"2": len(network.members)}


def test_values_that_are_not_finite_are_counted(
    small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "a.safetensors"
    write_adapter(path, small_sdxl_modules, "lora")
    tensors = load_tensors(path)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_tensors(path, tensors | {key: torch.full_like(tensors[key], float("nan"))})
    main([str(path), "--base", str(small_sdxl_file)])
    assert f"NaN or infinity in 1 tensors: {key}" in capsys.readouterr().out


def test_a_file_of_no_family_is_refused(tmp_path: Path):
    save_tensors(tmp_path / "a.safetensors", {"model.layers.0.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="not an adapter of a known family"):
        main([str(tmp_path / "a.safetensors")])
