"""SDXL's adaptable models without their weights: at full size, or as the header of a checkpoint describes them."""

from pathlib import Path
from typing import Any

from torch import nn

from library.models.filling import Component, plan
from library.models.sdxl import components
from library.models.sdxl.checkpoint import CONSTANTS, UNUSED, planned_vae
from library.models.sdxl.components import TEXT_1, TEXT_2, UNET
from library.models.sdxl.configuration import HEAD_WIDTH, LATENT_SCALE, SIZE_NUMBERS, SIZE_WIDTH
from library.models.sdxl.folder import SUBFOLDERS, folder_weights
from library.models.sdxl.lookalikes import seems_to_be
from library.models.weights import Weights, leave_out

TEXT_WIDTHS = (768, 1280)
SIZE_MARK = "model.diffusion_model.label_emb.0.0.weight"  # size conditioning, which SD 1 and 2 have not
UNET_SIZE: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": sum(TEXT_WIDTHS),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": TEXT_WIDTHS[1] + SIZE_NUMBERS * SIZE_WIDTH,
}

VAE_SIZE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": LATENT_SCALE,
}


def sdxl_outline(checkpoint: Path | None = None) -> tuple[nn.Module, nn.Module, nn.Module]:
    """U-Net and both text encoders on the meta device; what the checkpoint does not hold is at full size.

    Raises `ValueError` naming the checkpoint where it is of another family or not complete.
    """
    if checkpoint is None:
        return _full_size(UNET), _full_size(TEXT_1), _full_size(TEXT_2)
    sources = _in_folder(checkpoint) if checkpoint.is_dir() else _in_file(checkpoint)
    try:
        found = {component: plan(source, weights.under(source.prefix)).module for component, (source, weights) in sources.items()}
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    unet, first, second = (found.get(component) or _full_size(component) for component in (UNET, TEXT_1, TEXT_2))
    return unet, first, second


def vae_outline(path: Path | None = None) -> nn.Module:
    """The VAE of a checkpoint, file or folder, or the full-size one, on the meta device. Raises `ValueError` as `load_vae` does."""
    return components.build_vae(VAE_SIZE) if path is None else planned_vae(path)[0].module


def _in_folder(folder: Path) -> dict[Component, tuple[Component, Weights]]:
    found = [component for component in (UNET, TEXT_1, TEXT_2) if (folder / SUBFOLDERS[component]).is_dir()]
    if not found:
        raise ValueError(f"{folder}: has none of {SUBFOLDERS[UNET]}, {SUBFOLDERS[TEXT_1]} and {SUBFOLDERS[TEXT_2]}")
    return {component: folder_weights(component, folder / SUBFOLDERS[component]) for component in found}


def _in_file(file: Path) -> dict[Component, tuple[Component, Weights]]:
    weights = Weights([file], leave_out(CONSTANTS, UNUSED, says=False))
    found = [component for component in (UNET, TEXT_1, TEXT_2) if weights.under(component.prefix)]
    is_ours = UNET not in found or SIZE_MARK in weights.shapes
    if not found or not is_ours:
        other = seems_to_be(weights.shapes) or f"it has no tensor '{SIZE_MARK}'"
        raise ValueError(f"{file}: not an SDXL checkpoint: {other}")
    return {component: (component, weights) for component in found}


def _full_size(component: Component) -> nn.Module:
    if component is UNET:
        return components.build_unet(UNET_SIZE)
    if component is TEXT_1:
        return components.build_text_1(_text_size(TEXT_WIDTHS[0], layers=12, activation="quick_gelu"))
    assert component is TEXT_2
    return components.build_text_2(_text_size(TEXT_WIDTHS[1], layers=32, activation="gelu"))


def _text_size(width: int, layers: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "projection_dim": width,
        "hidden_act": activation,
    }
