"""Configurations of Anima's classes, read from the shapes of a checkpoint, so that other depths and widths load by the same rules.

What no shape tells is fixed here as Anima has it.
"""

import math
from dataclasses import dataclass
from itertools import count
from typing import Any

from library.models.weights import Shapes

PATCH = 4  # 2x2 latent pixels of one token
LATENT_CHANNELS = 16
VAE_LEVELS = 4  # three halvings: 8 pixels for a latent

TRANSFORMER_FACTS: dict[str, Any] = {
    "max_size": (128, 512, 512),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 4.0, 4.0),
    "concat_padding_mask": False,  # the mask is one of the 17 input channels, made by us
    "extra_pos_embed_type": None,
}
TRANSFORMER_SIZE: dict[str, Any] = {
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 28,
    "mlp_ratio": 4.0,
    "text_embed_dim": 1024,
    "adaln_lora_dim": 256,
}
ENCODER_FACTS: dict[str, Any] = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
ENCODER_SIZE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def transformer_size(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CosmosTransformer3DModel` for original shapes. Raises `ValueError` naming what is missing or does not fit."""
    width, patch = _matrix(shapes, "x_embedder.proj.1.weight")
    head = _shape(shapes, "blocks.0.self_attn.q_norm.weight", 1)[0]
    return {
        "in_channels": patch // PATCH,
        "out_channels": _matrix(shapes, "final_layer.linear.weight")[0] // PATCH,
        "num_attention_heads": _quotient(width, head, "x_embedder.proj.1.weight"),
        "attention_head_dim": head,
        "num_layers": _depth(shapes, "blocks.{}.self_attn.q_proj.weight"),
        "mlp_ratio": _ratio(_matrix(shapes, "blocks.0.mlp.layer1.weight")[0], width),
        "text_embed_dim": _matrix(shapes, "blocks.0.cross_attn.k_proj.weight")[1],
        "adaln_lora_dim": _matrix(shapes, "blocks.0.adaln_modulation_self_attn.1.weight")[0],
    }


def conditioner_size(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `AnimaTextConditioner` for the shapes below `llm_adapter.`. Raises `ValueError` as `transformer_size` does."""
    words, target = _matrix(shapes, "embed.weight")
    width, source = _matrix(shapes, "blocks.0.cross_attn.q_proj.weight")[1], _matrix(shapes, "blocks.0.cross_attn.k_proj.weight")[1]
    return {
        "source_dim": source,
        "target_dim": target,
        "model_dim": width,
        "num_layers": _depth(shapes, "blocks.{}.cross_attn.q_proj.weight"),
        "num_attention_heads": _quotient(
            width, _shape(shapes, "blocks.0.cross_attn.q_norm.weight", 1)[0], "blocks.0.cross_attn.q_norm.weight"
        ),
        "mlp_ratio": _ratio(_matrix(shapes, "blocks.0.mlp.0.weight")[0], width),
        "target_vocab_size": words,
        "use_self_attention": "blocks.0.self_attn.q_proj.weight" in shapes,
        "use_layer_norm": "blocks.0.norm_mlp.bias" in shapes,
    }


def encoder_size(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `Qwen3Config` for the shapes of a text encoder. Raises `ValueError` as `transformer_size` does."""
    words, width = _matrix(shapes, "embed_tokens.weight")
    head = _shape(shapes, "layers.0.self_attn.q_norm.weight", 1)[0]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": _matrix(shapes, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": _depth(shapes, "layers.{}.self_attn.q_proj.weight"),
        "num_attention_heads": _quotient(_matrix(shapes, "layers.0.self_attn.q_proj.weight")[0], head, "layers.0.self_attn.q_proj.weight"),
        "num_key_value_heads": _quotient(_matrix(shapes, "layers.0.self_attn.k_proj.weight")[0], head, "layers.0.self_attn.k_proj.weight"),
        "head_dim": head,
    }


@dataclass(frozen=True)
class VaeKeys:
    """How one layout of VAE files names the tensors that tell its configuration; the layers of the encoder stand in one row."""

    first: str
    convolution: str  # the last of a residual layer
    resample: str  # ends a level
    time: str  # beside `resample` where the level is halved in time too
    latents: str


ORIGINAL_VAE = VaeKeys(
    first="encoder.conv1.weight",
    convolution="encoder.downsamples.{}.residual.6.weight",
    resample="encoder.downsamples.{}.resample.1.weight",
    time="encoder.downsamples.{}.time_conv.weight",
    latents="conv2.weight",
)
DIFFUSERS_VAE = VaeKeys(
    first="encoder.conv_in.weight",
    convolution="encoder.down_blocks.{}.conv2.weight",
    resample="encoder.down_blocks.{}.resample.1.weight",
    time="encoder.down_blocks.{}.time_conv.weight",
    latents="post_quant_conv.weight",
)


def vae_size(shapes: Shapes, keys: VaeKeys = ORIGINAL_VAE) -> dict[str, Any]:
    """Arguments of `AutoencoderKLQwenImage` for the shapes of a VAE in this layout.

    Raises `ValueError` naming what is missing, and for latents of other channels or another scale than Anima's.
    """
    base, channels = _shape(shapes, keys.first, 5)[:2]
    latents = _shape(shapes, keys.latents, 5)[0]
    levels, in_time = _vae_levels(shapes, keys)
    check_latents(latents, len(levels))
    return {
        "base_dim": base,
        "z_dim": latents,
        "dim_mult": [_quotient(widths[-1], base, keys.first) for widths in levels],
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": in_time,
        "input_channels": channels,
    }


def check_latents(channels: int, levels: int) -> None:
    """Does a VAE give latents as Anima has them? Raises `ValueError` saying what it gives."""
    if channels != LATENT_CHANNELS or levels != VAE_LEVELS:
        raise ValueError(f"has {channels} latent channels at 1/{2 ** (levels - 1)} of the size; Anima's has {LATENT_CHANNELS} at 1/8")


def _vae_levels(shapes: Shapes, keys: VaeKeys) -> tuple[list[list[int]], list[bool]]:
    """The widths of the residual layers of each level, and whether each but the last is halved in time."""
    levels: list[list[int]] = [[]]
    in_time: list[bool] = []
    for n in count():
        if keys.convolution.format(n) in shapes:
            levels[-1].append(_shape(shapes, keys.convolution.format(n), 5)[0])
        elif keys.resample.format(n) in shapes:
            in_time.append(keys.time.format(n) in shapes)
            levels.append([])
        else:
            break
    empty = next((level for level, widths in enumerate(levels) if not widths), None)
    if empty is not None:
        raise ValueError(f"has no tensor '{keys.convolution.format('N')}' in level {empty} of its encoder")
    return levels, in_time


# Reading shapes

RANKS = {1: "a vector", 2: "a matrix", 5: "a convolution in three dimensions"}


def _shape(shapes: Shapes, key: str, rank: int) -> tuple[int, ...]:
    if not shapes.get(key) or 0 in shapes[key]:
        raise ValueError(f"has no tensor '{key}', or an empty one")
    if len(shapes[key]) != rank:
        raise ValueError(f"'{key}' has the shape {list(shapes[key])}; {RANKS[rank]} was expected")
    return shapes[key]


def _matrix(shapes: Shapes, key: str) -> tuple[int, int]:
    rows, columns = _shape(shapes, key, 2)
    return rows, columns


def _quotient(whole: int, part: int, key: str) -> int:
    if whole % part:
        raise ValueError(f"'{key}': {whole} channels cannot be divided into heads of {part}")
    return whole // part


def _ratio(inner: int, width: int) -> float:
    """The ratio from which the classes compute `int(width * ratio)` as `inner`, whatever the division rounds."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def _depth(shapes: Shapes, key: str) -> int:
    return next(n for n in count() if key.format(n) not in shapes)
