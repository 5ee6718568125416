"""Configurations of the SDXL classes, read from the shapes of an original checkpoint.

Widths, layers, transformer depths, vocabulary and projections stand in the shapes, so that small checkpoints and pruned relatives
load by the same rules. What no shape tells is fixed here as SDXL has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from library.models.weights import Shapes

NORM_GROUPS = 32
HEAD_WIDTH = 64  # of the U-Net and of both text encoders
SIZE_WIDTH = 256  # sinusoid of each of the six size numbers
SIZE_NUMBERS = 6
LATENT_SCALE = 0.13025


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel` for the shapes of `model.diffusion_model.`; `ValueError` names what is missing or impossible."""
    downs = _down_levels(shapes)
    ups = _up_levels(shapes, [level.layers + 1 for level in reversed(downs)])
    middle = _depth(shapes, "middle_block.1")
    widths = [level.width for level in downs]
    depths = [_compact(level.depths) for level in downs]
    if middle and not any(downs[-1].depths):
        depths[-1] = middle  # the class builds its mid block with the depth of the last level
    return {
        "in_channels": _shape(shapes, "input_blocks.0.0.weight")[1],
        "out_channels": _shape(shapes, "out.2.weight")[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": tuple(level.layers for level in downs),
        "down_block_types": tuple("CrossAttnDownBlock2D" if any(level.depths) else "DownBlock2D" for level in downs),
        "mid_block_type": _mid_block_type(shapes, middle),
        "up_block_types": tuple("CrossAttnUpBlock2D" if any(level.depths) else "UpBlock2D" for level in ups),
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": [_compact(level.depths) for level in ups],
        "attention_head_dim": tuple(max(1, width // HEAD_WIDTH) for width in widths),  # diffusers means the number of heads
        "cross_attention_dim": _cross_attention_width(shapes),
        "use_linear_projection": _linear_projection(shapes),
        "time_embedding_dim": _shape(shapes, "time_embed.0.weight")[0],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": _shape(shapes, "label_emb.0.0.weight")[1],
        "norm_num_groups": NORM_GROUPS,
    }


@dataclass(frozen=True)
class VaeKeys:
    """How one layout of VAE files names the tensors that tell its configuration."""

    block: str
    attention: str


ORIGINAL_VAE = VaeKeys("encoder.down.{}.block.{}.conv1.weight", "encoder.mid.attn_1.norm.weight")
DIFFUSERS_VAE = VaeKeys("encoder.down_blocks.{}.resnets.{}.conv1.weight", "encoder.mid_block.attentions.0.group_norm.weight")


def vae_config(shapes: Shapes, keys: VaeKeys = ORIGINAL_VAE) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for the shapes of `first_stage_model.` (or of a diffusers file with `keys=DIFFUSERS_VAE`)."""
    _shape(shapes, keys.block.format(0, 0))
    widths = [shapes[keys.block.format(i, 0)][0] for i in range(_number(shapes, lambda i: keys.block.format(i, 0)))]
    return {
        "in_channels": _shape(shapes, "encoder.conv_in.weight")[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight")[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": _number(shapes, lambda j: keys.block.format(0, j)),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": keys.attention in shapes,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": LATENT_SCALE,
    }


def text_config_1(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` for encoder 1, whose file has the names of transformers."""
    return _text_config(
        vocabulary=_shape(shapes, "embeddings.token_embedding.weight"),
        positions=_shape(shapes, "embeddings.position_embedding.weight")[0],
        intermediate=_shape(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        layers=_number(shapes, "encoder.layers.{}.mlp.fc1.weight".format),
        activation="quick_gelu",
    )


def text_config_2(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` for encoder 2, whose file has the names of OpenCLIP."""
    config = _text_config(
        vocabulary=_shape(shapes, "token_embedding.weight"),
        positions=_shape(shapes, "positional_embedding")[0],
        intermediate=_shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        layers=_number(shapes, "transformer.resblocks.{}.mlp.c_fc.weight".format),
        activation="gelu",
    )
    if "text_projection.weight" in shapes:  # written by ComfyUI: a Linear, not a matrix to multiply from the right
        return config | {"projection_dim": shapes["text_projection.weight"][0]}
    return config | {"projection_dim": _shape(shapes, "text_projection")[1]}


# Reading shapes


@dataclass
class _Level:
    """One resolution of the U-Net: its width and the transformer depth of each of its layers (0 without attention)."""

    width: int = 0
    depths: list[int] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.depths)


def _down_levels(shapes: Shapes) -> list[_Level]:
    levels = [_Level()]
    for i in count(1):
        resnet = shapes.get(f"input_blocks.{i}.0.out_layers.3.weight")
        if resnet is not None:
            levels[-1].width = resnet[0]
            levels[-1].depths.append(_depth(shapes, f"input_blocks.{i}.1"))
        elif f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append(_Level())
        else:
            break
    if not all(level.layers for level in levels):
        raise ValueError("has no tensor 'input_blocks.N.0.out_layers.3.weight' for one of its levels")
    uneven = [level.width for level in levels if any(level.depths) and level.width % HEAD_WIDTH]
    if uneven:
        raise ValueError(f"has attention at width {uneven[0]}; SDXL's heads are {HEAD_WIDTH} channels wide")
    return levels


def _up_levels(shapes: Shapes, layers: Sequence[int]) -> list[_Level]:
    levels, start = [], 0
    for length in layers:
        depths = [_depth(shapes, f"output_blocks.{start + j}.1") for j in range(length)]
        levels.append(_Level(0, depths))
        start += length
    return levels


def _depth(shapes: Shapes, path: str) -> int:
    return _number(shapes, (path + ".transformer_blocks.{}.attn1.to_q.weight").format)


def _compact(depths: Sequence[int]) -> int | list[int]:
    """One number where all layers are alike; 1 stands for layers without attention, whose blocks do not read it."""
    return max(depths[0], 1) if len(set(depths)) == 1 else list(depths)


def _mid_block_type(shapes: Shapes, depth: int) -> str | None:
    if depth:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if "middle_block.0.in_layers.2.weight" in shapes else None  # pruned relatives have one layer or none


def _cross_attention_width(shapes: Shapes) -> int:
    keys = [key for key in shapes if key.endswith(".transformer_blocks.0.attn2.to_k.weight")]
    if not keys:
        raise ValueError("has no tensor '*.transformer_blocks.0.attn2.to_k.weight': no level attends to the text")
    return shapes[keys[0]][1]


def _linear_projection(shapes: Shapes) -> bool:
    return all(len(shape) == 2 for key, shape in shapes.items() if key.endswith(".proj_in.weight"))


def _text_config(*, vocabulary: tuple[int, ...], positions: int, intermediate: int, layers: int, activation: str) -> dict[str, Any]:
    words, width = vocabulary
    if width % HEAD_WIDTH:
        raise ValueError(f"is {width} wide; CLIP's heads are {HEAD_WIDTH} wide")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": positions,
        "projection_dim": width,
        "hidden_act": activation,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,  # the true id, not the legacy 2, makes transformers pool at the first end token
        "pad_token_id": words - 1,
    }


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f"has no tensor '{key}'")
    return shapes[key]


def _number(shapes: Shapes, key: Any) -> int:
    """How many of `key(0)`, `key(1)`, ... there are."""
    return next(n for n in count() if key(n) not in shapes)
