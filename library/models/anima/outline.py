"""Anima's adaptable models without their weights: at full size, or as the header of a checkpoint describes them.

A single file holds the denoiser (its text conditioner inside) or the text encoder; what it does not hold is at full size.
"""

import json
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from library.core.tensor_file import read_header
from library.models.anima.names import ADAPTER, CONDITIONER, TRANSFORMER

Shapes = Mapping[str, tuple[int, ...]]
PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "model.", "")
PATCH = 4  # 2x2 latent pixels of one token

TRANSFORMER_FACTS: dict[str, Any] = {  # what no shape tells
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
ENCODER_SIZE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def anima_outline(checkpoint: Path | None = None) -> tuple[nn.Module, nn.Module]:
    """Denoiser and text encoder on the meta device.

    Raises `ValueError` naming the checkpoint where it is missing, broken or of another family.
    """
    if checkpoint is None:
        return build_denoiser(TRANSFORMER_SIZE, {}), build_encoder(ENCODER_SIZE)
    if checkpoint.is_dir():
        return _of_folder(checkpoint)
    shapes = {key: info.shape for key, info in read_header(checkpoint).tensors.items()}
    try:
        dit, text = _under(shapes, "x_embedder.proj.1.weight"), _under(shapes, "layers.0.self_attn.q_norm.weight")
        if dit is None and text is None:
            raise ValueError("not a checkpoint of Anima: it has neither 'x_embedder.proj.1.weight' nor 'layers.0.self_attn.q_norm.weight'")
        conditioner = {key.removeprefix(f"{ADAPTER}."): shape for key, shape in (dit or {}).items() if key.startswith(f"{ADAPTER}.")}
        denoiser = build_denoiser(transformer_size(dit) if dit else TRANSFORMER_SIZE, conditioner_size(conditioner) if conditioner else {})
        return denoiser, build_encoder(encoder_size(text) if text else ENCODER_SIZE)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def build_denoiser(transformer: Mapping[str, Any], conditioner: Mapping[str, Any]) -> nn.Module:
    """An empty transformer and text conditioner under their names in a pipeline, from their own constructors' arguments."""
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    build: dict[str, Callable[[], nn.Module]] = {
        TRANSFORMER: lambda: CosmosTransformer3DModel(**TRANSFORMER_FACTS, **transformer),
        CONDITIONER: lambda: AnimaTextConditioner(**conditioner),
    }
    return nn.ModuleDict({name: _empty(make) for name, make in build.items()})


def build_encoder(config: Mapping[str, Any]) -> nn.Module:
    """An empty `Qwen3Model`."""
    from transformers import Qwen3Config, Qwen3Model

    return _empty(lambda: Qwen3Model(Qwen3Config(**config)))


# Sizes from shapes


def transformer_size(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CosmosTransformer3DModel` for original shapes. Raises `ValueError` naming what is missing or does not fit."""
    width, patch = _matrix(shapes, "x_embedder.proj.1.weight")
    head = _shape(shapes, "blocks.0.self_attn.q_norm.weight")[0]
    return {
        "in_channels": patch // PATCH,
        "out_channels": _matrix(shapes, "final_layer.linear.weight")[0] // PATCH,
        "num_attention_heads": _quotient(width, head, "x_embedder.proj.1.weight"),
        "attention_head_dim": head,
        "num_layers": _depth(shapes, "blocks.{}.self_attn.q_proj.weight"),
        "mlp_ratio": _matrix(shapes, "blocks.0.mlp.layer1.weight")[0] / width,
        "text_embed_dim": _matrix(shapes, "blocks.0.cross_attn.k_proj.weight")[1],
        "adaln_lora_dim": _matrix(shapes, "blocks.0.adaln_modulation_self_attn.1.weight")[0],
    }


def conditioner_size(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `AnimaTextConditioner` for the shapes below `llm_adapter.`."""
    words, target = _matrix(shapes, "embed.weight")
    width, source = _matrix(shapes, "blocks.0.cross_attn.q_proj.weight")[1], _matrix(shapes, "blocks.0.cross_attn.k_proj.weight")[1]
    return {
        "source_dim": source,
        "target_dim": target,
        "model_dim": width,
        "num_layers": _depth(shapes, "blocks.{}.cross_attn.q_proj.weight"),
        "num_attention_heads": _quotient(
            width, _shape(shapes, "blocks.0.cross_attn.q_norm.weight")[0], "blocks.0.cross_attn.q_norm.weight"
        ),
        "mlp_ratio": _matrix(shapes, "blocks.0.mlp.0.weight")[0] / width,
        "target_vocab_size": words,
        "use_self_attention": "blocks.0.self_attn.q_proj.weight" in shapes,
        "use_layer_norm": "blocks.0.norm_mlp.bias" in shapes,
    }


def encoder_size(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `Qwen3Config` for the shapes of a text encoder."""
    words, width = _matrix(shapes, "embed_tokens.weight")
    head = _shape(shapes, "layers.0.self_attn.q_norm.weight")[0]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": _matrix(shapes, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": _depth(shapes, "layers.{}.self_attn.q_proj.weight"),
        "num_attention_heads": _quotient(_matrix(shapes, "layers.0.self_attn.q_proj.weight")[0], head, "layers.0.self_attn.q_proj.weight"),
        "num_key_value_heads": _quotient(_matrix(shapes, "layers.0.self_attn.k_proj.weight")[0], head, "layers.0.self_attn.k_proj.weight"),
        "head_dim": head,
    }


def _under(shapes: Shapes, mark: str) -> Shapes | None:
    """The shapes below the prefix under which `mark` stands, or None."""
    prefix = next((prefix for prefix in PREFIXES if prefix + mark in shapes), None)
    return None if prefix is None else {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if not shapes.get(key) or 0 in shapes[key]:
        raise ValueError(f"has no tensor '{key}', or an empty one")
    return shapes[key]


def _matrix(shapes: Shapes, key: str) -> tuple[int, int]:
    shape = _shape(shapes, key)
    if len(shape) != 2:
        raise ValueError(f"'{key}' has the shape {list(shape)}; a matrix was expected")
    return shape[0], shape[1]


def _quotient(whole: int, part: int, key: str) -> int:
    if whole % part:
        raise ValueError(f"'{key}': {whole} channels cannot be divided into heads of {part}")
    return whole // part


def _depth(shapes: Shapes, key: str) -> int:
    return next(n for n in count() if key.format(n) not in shapes)


# Folders in diffusers layout


def _of_folder(folder: Path) -> tuple[nn.Module, nn.Module]:
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = _config(folder / TRANSFORMER, "CosmosTransformer3DModel")
    if transformer is None:
        raise ValueError(f"{folder}: has no transformer/config.json; an Anima folder has transformer, text_conditioner and text_encoder")
    conditioner, encoder = _config(folder / CONDITIONER, "AnimaTextConditioner"), _config(folder / "text_encoder", "Qwen3Model")
    parts = {
        TRANSFORMER: _empty(lambda: CosmosTransformer3DModel.from_config(transformer)),
        CONDITIONER: _empty(lambda: AnimaTextConditioner.from_config(conditioner or {})),
    }
    return nn.ModuleDict(parts), _empty(lambda: Qwen3Model(Qwen3Config.from_dict(encoder or ENCODER_SIZE)))


def _config(folder: Path, wanted: str) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), wanted)
    if name.replace("ForCausalLM", "Model") != wanted:
        raise ValueError(f"{path}: is a {name}; Anima has a {wanted} there")
    return config


def _empty(build: Callable[[], Any]) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights():
        return build()
