"""Fixtures for every area: tiny random models of every family, as modules and as files with their tokenizers beside."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

WORDS = ("a", "cat", "dog", "red", "blue", "photo", "of", "the")
TEXT_WIDTHS = (64, 128)


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `caplog` see our lines, whatever a test before set up, and let every test hear the warnings that are said once."""
    monkeypatch.setattr(logging.getLogger("hadron"), "propagate", True)
    monkeypatch.setattr("library.core.log._said", set())


@pytest.fixture(scope="session")
def small_sdxl_modules() -> SimpleNamespace:
    """`unet`, `vae`, `text_encoder_1`, `text_encoder_2`: SDXL's classes at a tiny size, every parameter random, frozen, in eval mode."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 1, 1),
        "cross_attention_dim": sum(TEXT_WIDTHS),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": TEXT_WIDTHS[1] + 6 * 256,
    }
    vae: dict[str, Any] = {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    }
    torch.manual_seed(0)
    modules = SimpleNamespace(
        unet=UNet2DConditionModel(**unet),
        vae=AutoencoderKL(**vae),
        text_encoder_1=CLIPTextModel(CLIPTextConfig(**_text_config(TEXT_WIDTHS[0], "quick_gelu"))),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(TEXT_WIDTHS[1], "gelu"))),
    )
    for module in vars(modules).values():
        _make_random(module)
    return modules


@pytest.fixture(scope="session")
def small_anima_modules() -> SimpleNamespace:
    """`denoiser` (children `transformer` and `text_conditioner`) and `text_encoder` of a tiny Anima, random, frozen, in eval mode."""
    from small_anima import build_small_anima

    models = build_small_anima()
    return SimpleNamespace(denoiser=models.denoiser, text_encoder=models.text_encoder)


@pytest.fixture(scope="session")
def small_sdxl_file(small_sdxl_modules: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SDXL checkpoint in the original layout, fp32, with `<stem>.tokenizer/` beside it. Copy it before changing it."""
    from library.core.tensor_file import save_tensors
    from library.models.sdxl.checkpoint import single_file_state_dict

    path = tmp_path_factory.mktemp("small_sdxl") / "small.safetensors"
    save_tensors(path, single_file_state_dict(**vars(small_sdxl_modules), dtype=torch.float32))
    ids, merges = _vocabulary()
    folder = path.with_name("small.tokenizer")
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_anima_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files of a tiny random Anima (`dit`, `qwen3`, `vae`) in the original layout, with both tokenizers beside."""
    from small_anima import write_small_anima

    return write_small_anima(tmp_path_factory.mktemp("small_anima"))


@pytest.fixture(scope="session")
def small_model_options(request: pytest.FixtureRequest) -> Callable[[str], tuple[str, ...]]:
    """The training options that name the files of a family's tiny model. A new family adds its line."""

    def options(name: str) -> tuple[str, ...]:
        if name == "anima":
            files = request.getfixturevalue("small_anima_files")
            return ("--pretrained_model_name_or_path", str(files.dit), "--qwen3", str(files.qwen3), "--vae", str(files.vae))
        assert name == "sdxl", name
        return ("--pretrained_model_name_or_path", str(request.getfixturevalue("small_sdxl_file")))

    return options


def _text_config(width: int, activation: str) -> dict[str, Any]:
    size = len(_vocabulary()[0])
    return {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "hidden_act": activation,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's 256 bytes, and merges that make each of `WORDS` one token."""
    from library.models.sdxl.vocabulary import from_merges

    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[(parts[0], parts[1])] = None
            parts[:2] = [parts[0] + parts[1]]
    vocabulary = from_merges(list(merges), "conftest")
    return vocabulary.ids, vocabulary.merges


def _make_random(module: nn.Module) -> None:
    """Move every parameter off its initial value, so that no two norms or biases are alike."""
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))
