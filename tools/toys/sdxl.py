"""The toy SDXL: SDXL's own classes at a small size, and its small CLIP tokenizer.

Everything that a loader cannot read from the shapes of a checkpoint equals SDXL: 32 norm groups, attention heads of 64 channels,
linear projections, activations, positions, latents scale.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.toys.pictures import BACKGROUNDS, COLOURS, SHAPES, TEXTURES
from tools.toys.training import Network

LATENT_SCALE = 0.13025
POSITIONS = 77
UNET_CHANNELS = (64, 128, 64)
VAE_CHANNELS = (64, 32, 32, 64)
TEXT_WIDTHS = (64, 64)
TEXT_LAYERS = 2
EXTRA_WORDS = tuple("a an and the of on in with picture drawing photo image background style stripes dots shape its is colour".split())


@dataclass(kw_only=True)
class ToyModels:
    """The four networks of the toy SDXL and its tokenizers."""

    unet: Network  # UNet2DConditionModel
    vae: Network  # AutoencoderKL
    text_1: Network  # CLIPTextModel
    text_2: Network  # CLIPTextModelWithProjection
    tokenizer_1: CLIPTokenizer
    tokenizer_2: CLIPTokenizer

    def modules(self) -> dict[str, Network]:
        """The networks by the names of their scratch files."""
        return {"unet": self.unet, "vae": self.vae, "te1": self.text_1, "te2": self.text_2}


def build_models(seed: int = 0) -> ToyModels:
    """Untrained toy models, the same for the same seed."""
    torch.manual_seed(seed)
    tokens = build_vocabulary(caption_words())
    tokenizers = [build_tokenizer(*tokens) for _ in range(2)]
    tokenizers[1].pad_token_id = 0  # as SDXL's second tokenizer; the first pads with the end token
    vocabulary = len(tokens[0])
    return ToyModels(
        unet=_build_unet(),
        vae=_build_vae(),
        text_1=CLIPTextModel(_text_config(TEXT_WIDTHS[0], vocabulary, "quick_gelu")),
        text_2=CLIPTextModelWithProjection(_text_config(TEXT_WIDTHS[1], vocabulary, "gelu")),
        tokenizer_1=tokenizers[0],
        tokenizer_2=tokenizers[1],
    )


def caption_words() -> list[str]:
    """The words that become one token each; every other word is spelled in letters."""
    return [*SHAPES, *COLOURS, *TEXTURES, *BACKGROUNDS, *EXTRA_WORDS]


def build_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP byte-level vocabulary and the merges that make each word one token."""
    characters = byte_characters()
    tokens = characters + [c + "</w>" for c in characters]
    merges = merge_words([[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))])
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokens)) == len(tokens)
    return {token: number for number, token in enumerate(tokens)}, merges


def build_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    """The tokenizer of a vocabulary, 77 positions long."""
    options: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "model_max_length": POSITIONS}
    return CLIPTokenizer(**options)


def save_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json as CLIP's are."""
    vocabulary, merges = build_vocabulary(caption_words())
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=True) + "\n", encoding="ascii")
    folder.joinpath("merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n", encoding="utf-8")
    end = "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, "bos_token": "<|startoftext|>", "eos_token": end}
    config |= {"unk_token": end, "pad_token": end, "do_lower_case": True}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="ascii")


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int = POSITIONS) -> Tensor:
    """Token ids (captions, length) of cleaned captions."""
    cleaned = [re.sub(r"\s+", " ", ftfy.fix_text(caption)).strip().lower() for caption in captions]
    return tokenizer(cleaned, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def encode_text(models: ToyModels, captions: list[str], length: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """Context (captions, length, width 1 + width 2) and pooled vector (captions, width 2), as SDXL makes them."""
    first = models.text_1(tokenize(models.tokenizer_1, captions, length), output_hidden_states=True)
    second = models.text_2(tokenize(models.tokenizer_2, captions, length), output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


# ---------------------------------------------------------------- configurations


def _build_unet() -> Network:
    build: Network = UNet2DConditionModel
    return build(
        sample_size=8,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(channels // 64 for channels in UNET_CHANNELS),  # diffusers reads this as the number of heads
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * 256,
    )


def _build_vae() -> Network:
    build: Network = AutoencoderKL
    return build(
        sample_size=64,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=LATENT_SCALE,
        force_upcast=False,
    )


def _text_config(width: int, vocabulary: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=width // 64,
        max_position_embeddings=POSITIONS,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


# ---------------------------------------------------------------- byte pairs


def merge_words(spelled: list[list[str]]) -> list[tuple[str, str]]:
    """The merges, in their order, that make one token of each word; a word is given as its characters."""
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in spelled):
        pair = _commonest_pair(spelled)
        merges.append(pair)
        spelled = [_merge_pair(parts, pair) for parts in spelled]
    return merges


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies, in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


def _commonest_pair(spelled: list[list[str]]) -> tuple[str, str]:
    counts = Counter(pair for parts in spelled for pair in pairwise(parts))
    return min(counts, key=lambda pair: (-counts[pair], pair))


def _merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
