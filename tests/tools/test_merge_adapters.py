"""The tool: a command line to a merged checkpoint or one adapter, the table it prints, and what it refuses."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.core.tensor_file import load_tensors, read_header, save_tensors
from library.models.naming import naming_named
from networks import loha, lokr, lora
from networks.checkpoint_layers import fill_layers
from networks.network import Network
from networks.open_file import open_adapter
from networks.rewriting.combination import combined
from tools.merge_adapters import main


@pytest.fixture
def parts(small_sdxl_file: Path) -> list[nn.Module]:
    return [module for _, module in naming_named("sdxl").outline(small_sdxl_file)]


@pytest.fixture
def files(parts: list[nn.Module], tmp_path: Path) -> list[Path]:
    """A LoRA of all parts, a LoKr of the U-Net with its convolutions, and a LoHa of some layers."""
    unet, *encoders = parts
    networks: list[Network] = [
        lora.create_network(1.0, 2, 1.0, None, encoders, unet),
        lokr.create_network(1.0, 2, 1.0, None, None, unet, factor=4, conv_dim=2),
        loha.create_network(1.0, 2, 1.0, None, None, unet, only_patterns="output_blocks.*"),
    ]
    paths = [tmp_path / f"{name}.safetensors" for name in ("lora", "lokr", "loha")]
    torch.manual_seed(3)
    for network, path in zip(networks, paths, strict=True):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.1)
        network.save_weights(path, torch.float32, {"ss_base_model_version": "sdxl_base_v1-0"})
    return paths


def run(*words: object) -> None:
    main([str(word) for word in words])


def deltas(file: Path, base: Path) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {adapter.name: adapter.delta_weight().double() for adapter in open_adapter(file, base=base).adapters}


def test_two_adapters_go_into_a_checkpoint(files: list[Path], small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "merged.safetensors"
    run("--checkpoint", small_sdxl_file, "--adapters", *files[:2], "--strengths", 0.8, -0.5, "--out", out)
    before, after = load_tensors(small_sdxl_file), load_tensors(out)
    expected = {key: tensor.double() for key, tensor in before.items()}
    for file, strength in zip(files[:2], (0.8, -0.5), strict=True):
        for member in open_adapter(file, base=small_sdxl_file).members:
            if member.part.is_denoiser:
                delta = member.adapter.delta_weight().detach().double()
                expected[f"model.diffusion_model.{member.target.path}.weight"] += strength * delta
    unet = [key for key in before if key.startswith("model.diffusion_model.")]
    assert all(torch.allclose(after[key].double(), expected[key], rtol=1e-6, atol=1e-6) for key in unet)
    assert not torch.equal(after["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"],
                           before["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"])  # fmt: skip
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:3]] == ["adapter", "lora.safetensors", "lokr.safetensors"]
    assert hashlib.sha256(out.read_bytes()).hexdigest() in printed and f"{out.stat().st_size:,} bytes" in printed


def test_what_was_merged_stands_in_the_metadata(files: list[Path], small_sdxl_file: Path, tmp_path: Path):
    out = tmp_path / "merged.safetensors"
    run("--checkpoint", small_sdxl_file, "--adapters", files[0], "--strengths", 0.5, "--out", out, "--precision", "bf16")
    metadata = read_header(out).metadata
    assert metadata["modelspec.merged_from"] == "small, lora"
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert json.loads(metadata["ss_merged_adapters"]) == [{"file": "lora.safetensors", "strength": 0.5, "sha256": digest}]
    assert {info.dtype for info in read_header(out).tensors.values()} == {"BF16", "I64"}


def test_several_adapters_become_one_that_means_their_sum(
    files: list[Path], small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "sum.safetensors"
    run("--checkpoint", small_sdxl_file, "--adapters", *files, "--strengths", 0.8, -0.5, 2, "--out_adapter", out)
    wanted: dict[str, torch.Tensor] = {}
    for file, strength in zip(files, (0.8, -0.5, 2), strict=True):
        for name, delta in deltas(file, small_sdxl_file).items():
            wanted[name] = wanted.get(name, torch.zeros(())) + strength * delta
    found = deltas(out, small_sdxl_file)
    assert set(found) == set(wanted)
    assert all((found[name] - delta).norm() <= 1e-6 * delta.norm() for name, delta in wanted.items())
    titles = {adapter.name: adapter.title for adapter in open_adapter(out, base=small_sdxl_file).adapters}
    assert titles["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == "LoRA"
    assert titles["lora_unet_input_blocks_1_0_in_layers_2"] == "LoKr", "a layer of one adapter keeps its algorithm"
    assert titles["lora_unet_output_blocks_0_1_proj_in"] == "LoRA", "a layer of several is their exact sum"
    metadata = read_header(out).metadata
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_network_dim"] == "Dynamic"
    assert "reduced" not in capsys.readouterr().out


def test_the_sum_can_be_reduced(files: list[Path], small_sdxl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sum.safetensors"
    run("--checkpoint", small_sdxl_file, "--adapters", files[0], files[2], "--out_adapter", out, "--rank", 1)
    assert {adapter.rank for adapter in open_adapter(out, base=small_sdxl_file).adapters} == {1}
    assert "reduced: relative error " in capsys.readouterr().out


def test_dora_is_summed_by_way_of_the_base_model(parts: list[nn.Module], files: list[Path], small_sdxl_file: Path, tmp_path: Path):
    dora = tmp_path / "dora.safetensors"
    fill_layers(lora.create_network(1.0, 2, 1.0, None, None, parts[0]), small_sdxl_file)  # where magnitudes start
    network = lora.create_network(1.0, 2, 1.0, None, None, parts[0], only_patterns="output_blocks.0.*", dora_wd=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    network.save_weights(dora, torch.float32)
    words: tuple[Any, ...] = ("--adapters", dora, files[0], "--strengths", 0.5, 1)
    with pytest.raises(ValueError, match="lora_unet_output_blocks_0_1_.*: DoRA rescales the whole weight"):
        combined([open_adapter(dora, base=small_sdxl_file)], [0.5])
    run("--checkpoint", small_sdxl_file, *words, "--out_adapter", tmp_path / "sum.safetensors")
    run("--checkpoint", small_sdxl_file, *words, "--out", tmp_path / "merged.safetensors")
    run("--checkpoint", small_sdxl_file, "--adapters", tmp_path / "sum.safetensors", "--out", tmp_path / "again.safetensors")
    merged, again = load_tensors(tmp_path / "merged.safetensors"), load_tensors(tmp_path / "again.safetensors")
    assert all(torch.allclose(tensor, merged[key], rtol=1e-5, atol=1e-5) for key, tensor in again.items())


def test_whole_differences_add_up_too(files: list[Path], small_sdxl_file: Path, tmp_path: Path):
    name, norm = "lora_unet_output_blocks_0_1_proj_in", "lora_unet_output_blocks_0_1_norm"
    torch.manual_seed(2)
    one = {f"{name}.diff": torch.randn(64, 64), f"{name}.diff_b": torch.randn(64), f"{norm}.w_norm": torch.randn(64)}
    two = {f"{norm}.w_norm": torch.randn(64), f"{norm}.b_norm": torch.randn(64), "lora_unet_out_2.diff_b": torch.randn(4)}
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, tensors in zip(paths, (one, two), strict=True):
        save_tensors(path, tensors)
    out = tmp_path / "sum.safetensors"
    run("--checkpoint", small_sdxl_file, "--adapters", *paths, files[0], "--strengths", 0.5, 2, 1, "--out_adapter", out)
    found = load_tensors(out)
    torch.testing.assert_close(found[f"{norm}.w_norm"], 0.5 * one[f"{norm}.w_norm"] + 2 * two[f"{norm}.w_norm"])
    torch.testing.assert_close(found[f"{norm}.b_norm"], 2 * two[f"{norm}.b_norm"])
    torch.testing.assert_close(found[f"{name}.diff_b"], 0.5 * one[f"{name}.diff_b"])
    torch.testing.assert_close(found["lora_unet_out_2.diff_b"], 2 * two["lora_unet_out_2.diff_b"])
    assert "lora_unet_out_2.diff" not in found
    delta = deltas(files[0], small_sdxl_file)[name].float()
    torch.testing.assert_close(found[f"{name}.diff"], 0.5 * one[f"{name}.diff"] + delta, rtol=1e-5, atol=1e-6)
    run("--checkpoint", small_sdxl_file, "--adapters", out, "--out", tmp_path / "merged.safetensors")
    key = "model.diffusion_model.output_blocks.0.1.norm.bias"
    before, after = load_tensors(small_sdxl_file)[key], load_tensors(tmp_path / "merged.safetensors")[key]
    torch.testing.assert_close(after, before + 2 * two[f"{norm}.b_norm"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strengths", 1, 2, "--out", "m.safetensors"), "--strengths: 2 strengths for 1 adapters"),
        (("--strengths", "inf", "--out", "m.safetensors"), "--strengths: must be finite"),
        ((), "give either --out .* or --out_adapter"),
        (("--out", "m.safetensors", "--out_adapter", "a.safetensors"), "give either"),
        (("--out", "m.ckpt"), "m.ckpt: only .safetensors files are written"),
        (("--out", "m.safetensors", "--rank", 4), "--rank, --max_error: only for --out_adapter"),
        (("--out_adapter", "a.safetensors", "--rank", 0), "--rank 0: must be at least 1"),
        (("--out", "lora.safetensors"), "would replace one of the files"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    files: list[Path], small_sdxl_file: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], message: str
):
    monkeypatch.chdir(files[0].parent)
    with pytest.raises(ValueError, match=message):
        run("--checkpoint", small_sdxl_file, "--adapters", "lora.safetensors", *words)


def test_a_checkpoint_is_needed_to_merge_into_one(files: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match="--out: needs --checkpoint"):
        run("--adapters", files[0], "--out", tmp_path / "m.safetensors")


def test_an_adapter_of_another_family_is_refused(files: list[Path], small_sdxl_file: Path, tmp_path: Path):
    anima = tmp_path / "anima.safetensors"
    save_tensors(anima, {"lora_unet_blocks_0_self_attn_q_proj.lora_down.weight": torch.zeros(2, 2048),
                         "lora_unet_blocks_0_self_attn_q_proj.lora_up.weight": torch.zeros(2048, 2)})  # fmt: skip
    with pytest.raises(ValueError, match=r"small.safetensors: not a checkpoint of Anima"):
        run("--checkpoint", small_sdxl_file, "--adapters", anima, "--out", tmp_path / "m.safetensors")
    sdxl = tmp_path / "sdxl.safetensors"
    save_tensors(sdxl, {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff_b": torch.zeros(3072)})
    with pytest.raises(ValueError, match="different families: .*sdxl.safetensors for sdxl, .*anima.safetensors for anima"):
        run("--adapters", sdxl, anima, "--out_adapter", tmp_path / "m.safetensors")
