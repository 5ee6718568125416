"""The canonical names of SDXL's adaptable layers, generated from the structure in the order of sd-scripts.

Files, initialisation and what user patterns see follow the paths of the original checkpoint, whatever the library calls its classes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import nn

from library.models.naming import Blocks, Naming, Part, Place, Target, plain_target, weighted
from library.models.sdxl.keymap import RESNET, Block, text_level, unet_blocks
from library.models.sdxl.original_tree import is_original_tree, original_blocks

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
    other_prefixes=("unet", "lycoris", "model.diffusion_model"),
    blocks=Blocks(count=23, down=range(1, 10), mid=range(10, 13), up=range(13, 22), number=block_number),
)
TEXT_1 = Part(
    name="text encoder 1",
    prefix="lora_te1",
    is_denoiser=False,
    default_groups=("CLIPAttention", "CLIPMLP"),
    comfyui_prefix="text_encoders.clip_l.transformer",
    other_prefixes=("text_encoder", "clip_l.transformer", "clip_l", "te1", "conditioner.embedders.0.transformer"),
)
TEXT_2 = Part(
    name="text encoder 2",
    prefix="lora_te2",
    is_denoiser=False,
    default_groups=("CLIPAttention", "CLIPMLP"),
    comfyui_prefix="text_encoders.clip_g.transformer",
    other_prefixes=("text_encoder_2", "clip_g.transformer", "clip_g", "te2"),
)
PARTS = (UNET, TEXT_1, TEXT_2)
SUBFOLDER = {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}  # of a diffusers pipeline

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
    marks: ClassVar[tuple[str, ...]] = (
        r"(input_blocks|output_blocks|middle_block)_\d+_",
        r"(down_blocks_[12]|up_blocks_[01]|mid_block)_(attentions|resnets)_\d+_",
        r"te[12]_text_model_|clip_[lg]_|text_encoder_2_|conditioner_embedders_0_",
    )

    def recognises(self, denoiser: nn.Module) -> bool:
        """A U-Net with size conditioning: in the library's class tree, or in the original's as sd-scripts has it."""
        names = {name for name, _ in denoiser.named_children()}
        is_library_tree = {"down_blocks", "up_blocks", "add_time_proj", "add_embedding"} <= names
        return (is_library_tree and hasattr(denoiser.add_embedding, "linear_1")) or is_original_tree(denoiser)

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return list(_unet_targets(module) if part.is_denoiser else _text_targets(part, module))

    def outside(self, part: Part, module: nn.Module) -> list[Target]:
        known = {target.module_path for target in self.targets(part, module)}
        every = _unet_layers(module) if part.is_denoiser else _text_layers(part, module)
        return [target for target in every if target.module_path not in known]

    def places(self, part: Part, module: nn.Module) -> dict[str, Place]:
        from library.models.sdxl.places import sdxl_places  # builds on the models, which names alone do not need

        return sdxl_places(part, module)

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        from library.models.sdxl.outline import sdxl_outline

        return list(zip(PARTS, sdxl_outline(checkpoint), strict=True))


NAMING = SDXLNaming()


def _unet_targets(unet: nn.Module) -> Iterator[Target]:
    is_original = is_original_tree(unet)
    for block in original_blocks(unet) if is_original else unet_blocks(unet):
        if not block.container:
            continue
        for layer, original in _block_layers(unet, block, is_original):
            path = _joined(block.path, original)
            in_library = _joined(block.module_path, layer)
            yield Target(
                name=_name(UNET.prefix, path),
                path=path,
                module_path=path if is_original else in_library,
                group=block.container,
                container=block.path if original else block.path.rpartition(".")[0],
                diffusers_path=f"unet.{in_library}",
            )


def _block_layers(unet: nn.Module, block: Block, is_original: bool) -> Iterator[tuple[str, str]]:
    """The layers of a block as (name in the library, name in the original); a resampler's block is the layer itself."""
    module = unet.get_submodule(block.path if is_original else block.module_path)
    if block.container == "ResnetBlock2D":
        own = {path: layer for path, layer in module.named_modules() if not isinstance(layer, nn.Identity)}
        for layer in RESNET_LAYERS:
            if (RESNET[layer] if is_original else layer) in own:
                yield layer, RESNET[layer]
    elif block.container == "Transformer2DModel":
        depth = len(list(module.get_submodule("transformer_blocks").children()))
        inner = [f"transformer_blocks.{n}.{layer}" for n in range(depth) for layer in TRANSFORMER_LAYERS]
        for layer in ("proj_in", *inner, "proj_out"):
            yield layer, layer
    else:
        yield "", ""


def _unet_layers(unet: nn.Module) -> Iterator[Target]:
    """Every layer of the U-Net that has a weight, norms and ends too, as a layer that no group lists."""
    is_original = is_original_tree(unet)
    for block in original_blocks(unet) if is_original else unet_blocks(unet):
        root = unet.get_submodule(block.path if is_original else block.module_path)
        renamed = RESNET if block.container == "ResnetBlock2D" else {}
        back = {original: layer for layer, original in renamed.items()}
        for inner in weighted(root) or [""]:
            layer, original = (back.get(inner, inner), inner) if is_original else (inner, renamed.get(inner, inner))
            path, in_library = _joined(block.path, original), _joined(block.module_path, layer)
            yield plain_target(UNET, path, path if is_original else in_library, f"unet.{in_library}")


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
                diffusers_path=f"{SUBFOLDER[part.prefix]}.{path}",
                other_paths=(path.removeprefix("text_model."),),  # transformers since 5.6, of encoder 1
            )


def _text_layers(part: Part, encoder: nn.Module) -> Iterator[Target]:
    """Every layer of a text encoder that has a weight, as a layer that no group lists."""
    level = text_level(encoder)
    for module_path in weighted(encoder):
        inside = module_path.removeprefix(level)
        path = inside if inside == "text_projection" else f"text_model.{inside}"
        yield plain_target(part, path, module_path, f"{SUBFOLDER[part.prefix]}.{path}", (inside,))


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _name(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"
