"""Where each tensor of the library's classes stands in an original SDXL checkpoint.

The U-Net and VAE of the original number their blocks in one row (`input_blocks.4.1`), the library by level
(`down_blocks.1.attentions.0`). The rows are walked over the module in hand, so that every depth and width maps by the same rules.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.models.filling import SAME, Form, Source

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


FLAT = Form(lambda shape: (*shape, 1, 1), lambda tensor: tensor.reshape(tensor.shape[:2]))  # a 1x1 convolution there, a Linear here
TRANSPOSED = Form(lambda shape: shape[::-1], lambda tensor: tensor.t().contiguous())
THIRDS = tuple(Form(lambda shape: (3 * shape[0], *shape[1:]), lambda tensor, n=n: tensor.chunk(3)[n].clone()) for n in range(3))


@dataclass(frozen=True)
class Block:
    """A block of the U-Net: dotted path in the original, in the library, and its documented container."""

    path: str
    module_path: str
    container: str  # ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D; empty for the layers around the blocks


FIRST_LAYERS = (
    Block("time_embed.0", "time_embedding.linear_1", ""),
    Block("time_embed.2", "time_embedding.linear_2", ""),
    Block("label_emb.0.0", "add_embedding.linear_1", ""),
    Block("label_emb.0.2", "add_embedding.linear_2", ""),
    Block("input_blocks.0.0", "conv_in", ""),
)
LAST_LAYERS = (Block("out.0", "conv_norm_out", ""), Block("out.2", "conv_out", ""))
"""The layers around the blocks of the U-Net, before and after them."""


def unet_blocks(unet: nn.Module) -> list[Block]:
    """The blocks of the U-Net in the order of the original."""
    return [
        *FIRST_LAYERS,
        *_down_blocks(unet),
        *_mid_blocks(unet),
        *_up_blocks(unet),
        *LAST_LAYERS,
    ]


def unet_sources(unet: nn.Module) -> dict[str, Source]:
    """The place of every U-Net tensor under `model.diffusion_model.`."""
    table: dict[str, Source] = {}
    for block in unet_blocks(unet):
        names = RESNET if block.container == "ResnetBlock2D" else {}
        table |= _block_sources(unet, block.path, block.module_path, names)
    return table


def vae_sources(vae: nn.Module) -> dict[str, Source]:
    """The place of every VAE tensor under `first_stage_model.`."""
    table: dict[str, Source] = {}
    for path, module_path, names in _vae_blocks(vae):
        table |= _block_sources(vae, path, module_path, names, FLAT if names is VAE_ATTENTION else SAME)
    return table


def text_sources_1(encoder: nn.Module) -> dict[str, Source]:
    """The place of every tensor of text encoder 1 under `conditioner.embedders.0.transformer.text_model.`."""
    level = text_level(encoder)
    return {key: Source(key.removeprefix(level)) for key in encoder.state_dict()}


def text_sources_2(encoder: nn.Module) -> dict[str, Source]:
    """The place of every tensor of text encoder 2 under `conditioner.embedders.1.model.`."""
    level = text_level(encoder)
    return {key: _openclip_source(key.removeprefix(level)) for key in encoder.state_dict()}


def text_level(encoder: nn.Module) -> str:
    """`text_model.` where this version of transformers has that level in this class, else nothing."""
    return "text_model." if hasattr(encoder, "text_model") else ""


def originals(module: nn.Module, sources: dict[str, Source]) -> dict[str, Tensor]:
    """The tensors of `module` as the original file has them, by original key: the inverse of reading."""
    state = module.state_dict()
    thirds: dict[str, list[Tensor]] = {}
    table: dict[str, Tensor] = {}
    for name, source in sources.items():
        if source.form in THIRDS:
            thirds.setdefault(source.key, [state[name]] * 3)[THIRDS.index(source.form)] = state[name]
        else:
            table[source.key] = _written(state[name], source.form)
    return table | {key: torch.cat(parts) for key, parts in thirds.items()}


# U-Net blocks


def _down_blocks(unet: nn.Module) -> Iterator[Block]:
    i = 1
    for b, level in enumerate(unet.get_submodule("down_blocks").children()):
        for j in range(_length(level, "resnets")):
            yield from _layer(level, f"input_blocks.{i}", f"down_blocks.{b}", j)
            i += 1
        if _has(level, "downsamplers"):
            yield Block(f"input_blocks.{i}.0.op", f"down_blocks.{b}.downsamplers.0.conv", "Downsample2D")
            i += 1


def _mid_blocks(unet: nn.Module) -> Iterator[Block]:
    if not _has(unet, "mid_block"):
        return
    level = unet.get_submodule("mid_block")
    yield Block("middle_block.0", "mid_block.resnets.0", "ResnetBlock2D")
    if _has(level, "attentions"):
        yield Block("middle_block.1", "mid_block.attentions.0", "Transformer2DModel")
        yield Block("middle_block.2", "mid_block.resnets.1", "ResnetBlock2D")


def _up_blocks(unet: nn.Module) -> Iterator[Block]:
    i = 0
    for b, level in enumerate(unet.get_submodule("up_blocks").children()):
        for j in range(_length(level, "resnets")):
            yield from _layer(level, f"output_blocks.{i}", f"up_blocks.{b}", j)
            i += 1
        if _has(level, "upsamplers"):
            place = 2 if _has(level, "attentions") else 1
            yield Block(f"output_blocks.{i - 1}.{place}.conv", f"up_blocks.{b}.upsamplers.0.conv", "Upsample2D")


def _layer(level: nn.Module, path: str, module_path: str, j: int) -> Iterator[Block]:
    yield Block(f"{path}.0", f"{module_path}.resnets.{j}", "ResnetBlock2D")
    if _has(level, "attentions"):
        yield Block(f"{path}.1", f"{module_path}.attentions.{j}", "Transformer2DModel")


# VAE blocks


def _vae_blocks(vae: nn.Module) -> Iterator[tuple[str, str, dict[str, str]]]:
    for side in ("encoder", "decoder"):
        half = vae.get_submodule(side)
        yield f"{side}.conv_in", f"{side}.conv_in", {}
        if side == "encoder":
            yield from _vae_levels(half.get_submodule("down_blocks"), "encoder.down", "encoder.down_blocks", "downsample")
        yield from _vae_mid(half.get_submodule("mid_block"), f"{side}.mid", f"{side}.mid_block")
        if side == "decoder":
            yield from _vae_levels(half.get_submodule("up_blocks"), "decoder.up", "decoder.up_blocks", "upsample")
        yield f"{side}.norm_out", f"{side}.conv_norm_out", {}
        yield f"{side}.conv_out", f"{side}.conv_out", {}
    for name in ("quant_conv", "post_quant_conv"):
        if _has(vae, name):
            yield name, name, {}


def _vae_levels(levels: nn.Module, path: str, module_path: str, sampler: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    blocks = list(levels.children())
    for i, level in enumerate(blocks):
        place = i if sampler == "downsample" else len(blocks) - 1 - i  # the original counts the decoder's levels from the image
        for j in range(_length(level, "resnets")):
            yield f"{path}.{place}.block.{j}", f"{module_path}.{i}.resnets.{j}", VAE_RESNET
        if _has(level, f"{sampler}rs"):
            yield f"{path}.{place}.{sampler}.conv", f"{module_path}.{i}.{sampler}rs.0.conv", {}


def _vae_mid(level: nn.Module, path: str, module_path: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    yield f"{path}.block_1", f"{module_path}.resnets.0", VAE_RESNET
    if _has(level, "attentions"):
        yield f"{path}.attn_1", f"{module_path}.attentions.0", VAE_ATTENTION
    yield f"{path}.block_2", f"{module_path}.resnets.1", VAE_RESNET


# Keys


def _block_sources(module: nn.Module, path: str, module_path: str, names: dict[str, str], matrices: Form = SAME) -> dict[str, Source]:
    """Sources of one block; `names` renames its layers, `matrices` is the form of its two-dimensional tensors."""
    table: dict[str, Source] = {}
    for key, tensor in module.get_submodule(module_path).state_dict().items():
        layer, _, leaf = key.rpartition(".")
        inner = f"{names.get(layer, layer)}.{leaf}" if layer else leaf
        table[f"{module_path}.{key}"] = Source(f"{path}.{inner}", matrices if tensor.ndim == 2 else SAME)
    return table


def _openclip_source(key: str) -> Source:
    if key == "text_projection.weight":
        return Source("text_projection", TRANSPOSED)  # SGM multiplies pooled @ text_projection
    if key in OPENCLIP_TOP:
        return Source(OPENCLIP_TOP[key])
    number, _, rest = key.removeprefix("encoder.layers.").partition(".")
    layer, _, leaf = rest.rpartition(".")
    path = f"transformer.resblocks.{number}"
    if layer in OPENCLIP_LAYER:
        return Source(f"{path}.{OPENCLIP_LAYER[layer]}.{leaf}")
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(layer)
    return Source(f"{path}.attn.in_proj_{leaf}", THIRDS[third])


def _written(tensor: Tensor, form: Form) -> Tensor:
    if form is FLAT:
        return tensor[:, :, None, None]
    return tensor.t().contiguous() if form is TRANSPOSED else tensor


def _length(module: nn.Module, name: str) -> int:
    return len(list(module.get_submodule(name).children()))


def _has(module: nn.Module, name: str) -> bool:
    """Does the module have this child (the classes set absent ones to None, or to a list of None)?"""
    child = getattr(module, name, None)
    return child is not None and (not isinstance(child, nn.ModuleList) or (len(child) > 0 and child[0] is not None))
