"""The canonical names of SDXL's adaptable layers, generated from the structure in the order of sd-scripts.

Files, initialisation and what user patterns see follow the paths of the original checkpoint, whatever the library calls its classes.
"""

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from library.models.naming import Blocks, Naming, Part, Target
from library.models.sdxl.keymap import RESNET, text_level, unet_blocks

SECTIONS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}  # numbers of their first blocks; 0 and 22 are the ends


def block_number(path: str) -> int:
    """The number of a layer's block in block-wise tables: 0 embeddings, 1-9 input, 10-12 middle, 13-21 output, 22 last."""
    section, _, rest = path.partition(".")
    if section not in SECTIONS:
        return 22 if section == "out" else 0
    return SECTIONS[section] + int(rest.partition(".")[0])


UNET = Part(
    name="unet",
    prefix="lora_unet",
    is_denoiser=True,
    default_groups=("Transformer2DModel",),
    conv_groups=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    comfyui_prefix="diffusion_model",
    other_prefixes=("unet", "lycoris", "model.diffusion_model", "base_model.model"),
    blocks=Blocks(count=23, down=range(1, 10), mid=range(10, 13), up=range(13, 22), number=block_number),
)
TEXT_1 = Part(
    name="text encoder 1",
    prefix="lora_te1",
    is_denoiser=False,
    default_groups=("CLIPAttention", "CLIPMLP"),
    comfyui_prefix="text_encoders.clip_l.transformer",
    other_prefixes=("text_encoder",),
)
TEXT_2 = Part(
    name="text encoder 2",
    prefix="lora_te2",
    is_denoiser=False,
    default_groups=("CLIPAttention", "CLIPMLP"),
    comfyui_prefix="text_encoders.clip_g.transformer",
    other_prefixes=("text_encoder_2",),
)
PARTS = (UNET, TEXT_1, TEXT_2)

RESNET_LAYERS = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
TRANSFORMER_LAYERS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("ff.net.0.proj", "ff.net.2"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)
TEXT_LAYERS = (
    *(("CLIPAttention", f"self_attn.{name}") for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
    *(("CLIPMLP", f"mlp.{name}") for name in ("fc1", "fc2")),
)


class SDXLNaming(Naming):
    """The names of SDXL's layers."""

    name: ClassVar[str] = "sdxl"
    title: ClassVar[str] = "SDXL"
    parts: ClassVar[tuple[Part, ...]] = PARTS

    def recognises(self, denoiser: nn.Module) -> bool:
        """A U-Net with size conditioning: `UNet2DConditionModel` configured as in SDXL."""
        conditioning = getattr(getattr(denoiser, "config", None), "addition_embed_type", None)
        return conditioning == "text_time" and isinstance(getattr(denoiser, "down_blocks", None), nn.ModuleList)

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return list(_unet_targets(module) if part.is_denoiser else _text_targets(part, module))

    def outline(self, part: Part) -> nn.Module:
        raise NotImplementedError


NAMING = SDXLNaming()


def _unet_targets(unet: nn.Module) -> Iterator[Target]:
    for block in unet_blocks(unet):
        if not block.container:
            continue
        for layer, original in _block_layers(block.container, unet.get_submodule(block.module_path)):
            path = f"{block.path}.{original}".rstrip(".")
            yield Target(
                name=_name(UNET.prefix, path),
                path=path,
                module_path=f"{block.module_path}.{layer}".rstrip("."),
                group=block.container,
                container=block.path if original else block.path.rpartition(".")[0],
            )


def _block_layers(container: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """The layers of a block as (name in the library, name in the original); a resampler's block is the layer itself."""
    if container == "ResnetBlock2D":
        for layer in RESNET_LAYERS:
            if getattr(block, layer, None) is not None:
                yield layer, RESNET[layer]
    elif container == "Transformer2DModel":
        depth = len(list(block.get_submodule("transformer_blocks").children()))
        inner = [f"transformer_blocks.{n}.{layer}" for n in range(depth) for layer in TRANSFORMER_LAYERS]
        for layer in ("proj_in", *inner, "proj_out"):
            yield layer, layer
    else:
        yield "", ""


def _text_targets(part: Part, encoder: nn.Module) -> Iterator[Target]:
    """Both encoders are named as transformers named them before 5.6, with the level `text_model` that encoder 1 has lost since."""
    level = text_level(encoder)
    layers = encoder.get_submodule(f"{level}encoder.layers")
    for n in range(len(list(layers.children()))):
        for group, layer in TEXT_LAYERS:
            path = f"text_model.encoder.layers.{n}.{layer}"
            yield Target(
                name=_name(part.prefix, path),
                path=path,
                module_path=level + path.removeprefix("text_model."),
                group=group,
                container=f"text_model.encoder.layers.{n}.{layer.partition('.')[0]}",
            )


def _name(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"
