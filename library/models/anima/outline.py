"""Anima's adaptable models without their weights: at full size, or as the header of a checkpoint describes them.

A single file holds the denoiser (its text conditioner inside) or the text encoder, a folder of such files both; what they do not hold is
at full size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from library.core.tensor_file import read_header
from library.models import lookalikes
from library.models.anima.components import (
    CONDITIONER,
    DIT_LAYOUTS,
    ENCODER,
    ENCODER_LAYOUTS,
    TRANSFORMER,
    Marked,
    build_conditioner,
    build_encoder,
    build_transformer,
    build_vae,
)
from library.models.anima.configuration import ENCODER_SIZE, TRANSFORMER_SIZE, conditioner_size, encoder_size, transformer_size
from library.models.anima.folder import SUBFOLDERS, folder_component
from library.models.anima.names import ADAPTER
from library.models.filling import Component
from library.models.weights import Shapes


def anima_outline(checkpoint: Path | None = None) -> tuple[nn.Module, nn.Module]:
    """Denoiser and text encoder on the meta device.

    Raises `ValueError` naming the checkpoint where it is missing, broken or of another family.
    """
    if checkpoint is None:
        return build_denoiser(TRANSFORMER_SIZE, {}), build_encoder(ENCODER_SIZE)
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    if not files or (checkpoint / SUBFOLDERS[TRANSFORMER]).is_dir():
        return _of_folder(checkpoint)
    headers = [{key: info.shape for key, info in read_header(file).tensors.items()} for file in files]
    try:
        dit, text = _among(headers, DIT_LAYOUTS[0]), _among(headers, ENCODER_LAYOUTS[0])
        if dit is None and text is None:
            raise ValueError(_unknown({key: shape for shapes in headers for key, shape in shapes.items()}))
        conditioner = {key.removeprefix(f"{ADAPTER}."): shape for key, shape in (dit or {}).items() if key.startswith(f"{ADAPTER}.")}
        denoiser = build_denoiser(transformer_size(dit) if dit else TRANSFORMER_SIZE, conditioner_size(conditioner) if conditioner else {})
        return denoiser, build_encoder(encoder_size(text) if text else ENCODER_SIZE)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def full_size() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Transformer, text conditioner, text encoder and VAE of Anima as it was published, on the meta device."""
    return build_transformer(TRANSFORMER_SIZE), build_conditioner({}), build_encoder(ENCODER_SIZE), build_vae({})


def build_denoiser(transformer: Mapping[str, Any], conditioner: Mapping[str, Any]) -> nn.ModuleDict:
    """An empty transformer and text conditioner under their names in a pipeline, from their own constructors' arguments."""
    return nn.ModuleDict({SUBFOLDERS[TRANSFORMER]: build_transformer(transformer), SUBFOLDERS[CONDITIONER]: build_conditioner(conditioner)})


def _among(headers: Sequence[Shapes], layout: Marked) -> Shapes | None:
    """The shapes below the prefix under which the layout's mark stands in the first file that has it, or None."""
    found = ((shapes, prefix) for shapes in headers for prefix in layout.prefixes if prefix + layout.mark in shapes)
    shapes, prefix = next(found, ({}, None))
    return None if prefix is None else {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _unknown(shapes: Shapes) -> str:
    other = lookalikes.seems_to_be(shapes, "anima", "adapters of Anima change a DiT and a Qwen3 text encoder")
    lacks = f"not a checkpoint of Anima: it has neither '{DIT_LAYOUTS[0].mark}' nor '{ENCODER_LAYOUTS[0].mark}'"
    return lacks + (f"; {other}" if other else "")


# Folders in diffusers layout


def _of_folder(folder: Path) -> tuple[nn.Module, nn.Module]:
    parts = {SUBFOLDERS[component]: _in_folder(component, folder) for component in (TRANSFORMER, CONDITIONER)}
    if parts[SUBFOLDERS[TRANSFORMER]] is None:
        raise ValueError(f"{folder}: has no transformer/config.json; an Anima folder has transformer, text_conditioner and text_encoder")
    encoder = _in_folder(ENCODER, folder) or build_encoder(ENCODER_SIZE)
    return nn.ModuleDict({name: part or build_conditioner({}) for name, part in parts.items()}), encoder


def _in_folder(component: Component, folder: Path) -> nn.Module | None:
    below = folder / SUBFOLDERS[component]
    return folder_component(component, below).build({}) if (below / "config.json").is_file() else None
