"""What a run on SDXL has of its own: names, metadata, network arguments."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_family import SmallFamily

from library.core.options import OptionError
from library.core.tensor_file import load_tensors, read_header


def test_wrong_network_arguments_are_said_before_a_model_is_loaded(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    extra = ["--network_args", "conv_dimm=3", "rank_dropout=2", "loraplus_targets=x", "train_llm_adapter=True"]
    with pytest.raises(OptionError) as caught:
        replace(sdxl, files=("--pretrained_model_name_or_path", "absent.safetensors")).run(images, tmp_path, *extra)
    text = str(caught.value)
    assert "did you mean 'conv_dim'?" in text and "rank_dropout=2.0" in text and "SDXL has no such layers" in text


def test_dora_starts_from_the_weights_that_fp8_has_rounded(sdxl: SmallFamily, small_sdxl_file: Path, images: Path, tmp_path: Path) -> None:
    extra = ["--fp8_base", "--mixed_precision", "bf16", "--network_train_unet_only", "--max_train_steps", "1", "--learning_rate", "1e-12"]
    result = sdxl.run(images, tmp_path, *extra, "--network_args", "dora_wd=True", module="networks.lora")
    path = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    weight = load_tensors(small_sdxl_file)[f"model.diffusion_model.{path}.weight"].to(torch.bfloat16).to(torch.float8_e4m3fn).float()
    found = load_tensors(result.file)[f"lora_unet_{path.replace('.', '_')}.dora_scale"].float()
    torch.testing.assert_close(found.flatten(), weight.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_metadata_says_how_the_file_was_made(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    extra = ["--network_args", "conv_dim=2", "--optimizer_args", "weight_decay=0.1", "--metadata_author", "me"]
    metadata = read_header(sdxl.run(images, tmp_path, "--max_train_steps", "1", *extra).file).metadata
    expected = {
        "ss_network_module": "networks.loha", "ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_base_model_version": "sdxl_base_v1-0",
        "ss_seed": "1", "ss_learning_rate": "0.01", "ss_steps": "1", "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_num_train_images": "5", "ss_v2": "False", "ss_clip_skip": "None", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon", "modelspec.author": "me", "modelspec.title": "net", "ss_output_name": "net",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2"}
    assert len(metadata["sshs_model_hash"]) == 64 and len(metadata["sshs_legacy_hash"]) == 8
    assert "ss_tag_frequency" in metadata
