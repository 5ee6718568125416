"""The canonical names of SDXL's adaptable layers, generated from the structure in the order of sd-scripts.

Files, initialisation and what user patterns see follow the paths of the original checkpoint, whatever the library calls its classes.
"""

from collections.abc import Iterator

from torch import nn

from library.models.architecture import Part, Target
from library.models.sdxl.keymap import RESNET, text_level, unet_blocks

UNET = Part(
    name="unet",
    prefix="lora_unet",
    is_denoiser=True,
    default_groups=("Transformer2DModel",),
    conv_groups=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
)
TEXT_1 = Part(name="text encoder 1", prefix="lora_te1", is_denoiser=False, default_groups=("CLIPAttention", "CLIPMLP"))
TEXT_2 = Part(name="text encoder 2", prefix="lora_te2", is_denoiser=False, default_groups=("CLIPAttention", "CLIPMLP"))
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


def targets(part: Part, module: nn.Module) -> list[Target]:
    """The adaptable layers of `module`, the model of `part`, in canonical order."""
    return list(_unet_targets(module) if part.is_denoiser else _text_targets(part, module))


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
