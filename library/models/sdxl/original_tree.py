"""SDXL's U-Net in the class tree of the original, as sd-scripts' own class has it: module paths are the checkpoint's paths."""

from collections.abc import Iterator

from torch import nn

from library.models.sdxl.keymap import FIRST_LAYERS, LAST_LAYERS, Block

CHILDREN = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")


def is_original_tree(denoiser: nn.Module) -> bool:
    """Whether this is SDXL's U-Net in the original tree: size conditioning, and no attention at the first level, unlike SD 1 and 2."""
    children = dict(denoiser.named_children())
    if any(name not in children for name in CHILDREN):
        return False
    first = dict(children["input_blocks"].named_children()).get("1", nn.Identity())
    return not any(hasattr(layer, "transformer_blocks") for layer in first.children())


def original_blocks(unet: nn.Module) -> list[Block]:
    """The blocks in the order of the original; their `module_path` is the library's, which is not the tree at hand."""
    return [
        *FIRST_LAYERS,
        *_levels(unet, "input_blocks", "down_blocks", "downsamplers", start=1),
        *_middle(unet),
        *_levels(unet, "output_blocks", "up_blocks", "upsamplers", start=0),
        *LAST_LAYERS,
    ]


def _levels(unet: nn.Module, section: str, levels: str, samplers: str, start: int) -> Iterator[Block]:
    """A row of numbered blocks; a resampler ends a level, in a block of its own (down) or behind the other layers (up)."""
    level = number = 0
    for i, block in list(enumerate(unet.get_submodule(section).children()))[start:]:
        for j, layer in enumerate(block.children()):
            path = f"{section}.{i}.{j}"
            if hasattr(layer, "in_layers"):
                yield Block(path, f"{levels}.{level}.resnets.{number}", "ResnetBlock2D")
            elif hasattr(layer, "transformer_blocks"):
                yield Block(path, f"{levels}.{level}.attentions.{number}", "Transformer2DModel")
            else:
                sampler = "op" if samplers == "downsamplers" else "conv"
                container = "Downsample2D" if sampler == "op" else "Upsample2D"
                yield Block(f"{path}.{sampler}", f"{levels}.{level}.{samplers}.0.conv", container)
                level, number = level + 1, -1
        number += 1


def _middle(unet: nn.Module) -> Iterator[Block]:
    numbers = {"resnets": 0, "attentions": 0}
    for i, layer in enumerate(unet.get_submodule("middle_block").children()):
        kind, container = ("resnets", "ResnetBlock2D") if hasattr(layer, "in_layers") else ("attentions", "Transformer2DModel")
        yield Block(f"middle_block.{i}", f"mid_block.{kind}.{numbers[kind]}", container)
        numbers[kind] += 1
