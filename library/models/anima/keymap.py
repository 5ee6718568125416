"""Where each tensor of the library's classes stands in Anima's original files, by walking the module in hand: any depth maps by one rule.

The text conditioner and the text encoder have the same names in both. The VAE's original numbers its layers in one row
(`decoder.upsamples.7`), the library's decoder by level (`decoder.up_blocks.1.upsamplers.0`).
"""

from collections.abc import Iterator

from torch import nn

from library.models.anima.names import BLOCK, BLOCK_NORMS, END, STEM, TIME_NORM
from library.models.filling import Source

VAE_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}
VAE_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
VAE_MIDDLE = {"mid_block.resnets.0": "middle.0", "mid_block.attentions.0": "middle.1", "mid_block.resnets.1": "middle.2"}
VAE_LATENTS = {"quant_conv": "conv1", "post_quant_conv": "conv2"}


def transformer_sources(transformer: nn.Module) -> dict[str, Source]:
    """The place of every tensor of a `CosmosTransformer3DModel` below the file's prefix."""
    depth = len(list(transformer.get_submodule("transformer_blocks").children()))
    names = dict(_transformer_layers(depth))
    return {key: Source(_renamed(key, names)) for key in transformer.state_dict()}


def vae_sources(vae: nn.Module) -> dict[str, Source]:
    """The place of every tensor of an `AutoencoderKLQwenImage`."""
    names = {**VAE_LATENTS, **dict(_vae_layers(vae, "encoder")), **dict(_vae_layers(vae, "decoder"))}
    return {key: Source(_renamed(key, names)) for key in vae.state_dict()}


def _renamed(key: str, names: dict[str, str]) -> str:
    layer, _, leaf = key.rpartition(".")
    return f"{names[layer]}.{leaf}"


def _transformer_layers(depth: int) -> Iterator[tuple[str, str]]:
    """Library path and original path of every layer."""
    for path, own in TIME_NORM.items():
        yield own, path
    for section in (*STEM, *END):
        for layer, own in section.layers.items():
            yield f"{section.in_library}.{own}".lstrip("."), f"{section.path}.{layer}"
    for n in range(depth):
        for layer, own in (BLOCK | BLOCK_NORMS).items():
            yield f"transformer_blocks.{n}.{own}", f"blocks.{n}.{layer}"


def _vae_layers(vae: nn.Module, side: str) -> Iterator[tuple[str, str]]:
    """Library path and original path of every layer of the encoder or the decoder."""
    half = vae.get_submodule(side)
    row = _encoder_row(half) if side == "encoder" else _decoder_row(half)
    blocks = {**VAE_ENDS, **VAE_MIDDLE, **row}
    for own, path in blocks.items():
        for layer, _ in half.get_submodule(own).named_modules():
            inner = VAE_RESIDUAL.get(layer, layer)
            yield f"{side}.{own}.{layer}".rstrip("."), f"{side}.{path}.{inner}".rstrip(".")


def _encoder_row(encoder: nn.Module) -> dict[str, str]:
    return {f"down_blocks.{n}": f"downsamples.{n}" for n, _ in enumerate(encoder.get_submodule("down_blocks").children())}


def _decoder_row(decoder: nn.Module) -> dict[str, str]:
    levels = decoder.get_submodule("up_blocks").named_children()
    layers = [
        f"up_blocks.{level}.{kind}.{n}"
        for level, block in levels
        for kind in ("resnets", "upsamplers")
        for n, _ in enumerate(getattr(block, kind) or ())
    ]
    return {layer: f"upsamples.{n}" for n, layer in enumerate(layers)}
