"""SDXL checkpoints: an original single file or a diffusers folder into diffusers' and transformers' classes, and back.

Everything is read offline; tensors are memory-mapped and cast one by one. A pickle is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.core.tensor_file import listing
from library.diffusion.ddpm import PredictionOptions
from library.models.filling import Component, Plan, plan, same_names
from library.models.sdxl.components import COMPONENTS, TEXT_1, TEXT_2, UNET, VAE, build_vae
from library.models.sdxl.configuration import DIFFUSERS_VAE, LATENT_SCALE, SIZE_NUMBERS, SIZE_WIDTH, vae_config
from library.models.sdxl.folder import SUBFOLDERS, folder_weights
from library.models.sdxl.keymap import originals
from library.models.sdxl.lookalikes import seems_to_be
from library.models.sdxl.prediction import MARKS, check_prediction
from library.models.weights import Weights, leave_out

LOGIT_SCALE = 4.6052  # ln 100, CLIP's temperature: unused here, but a key that other readers expect
CONSTANTS = re.compile(  # extra tensors that carry nothing: positions, temperatures, noise schedules
    r".*\.position_ids|.*\blogit_scale|.*\.attn_mask|conditioner\.embedders\.0\..*text_projection(\.weight)?"
    r"|denoiser\.(log_)?sigmas|betas|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|logvar|lvlb_weights|scale_factor"
)
UNUSED = ("model_ema.", "first_stage_model.model_ema.", "first_stage_model.loss.")  # weights that the model in use has no place for
MEANINGFUL = leave_out(CONSTANTS, UNUSED)


@dataclass(kw_only=True)
class Loaded:
    """The four models of SDXL, frozen, in eval mode."""

    unet: nn.Module
    vae: nn.Module
    text_encoder_1: nn.Module
    text_encoder_2: nn.Module


def load_checkpoint(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    vae: Path | str | None = None,
    vae_dtype: torch.dtype | None = None,
    prediction: PredictionOptions | None = None,
) -> Loaded:
    """Load a single file or a diffusers folder; `vae` names another VAE, `vae_dtype` its dtype where it differs.

    `prediction` is what the user says that the model predicts: noise, where absent. Raises `ValueError` that names the file and every
    missing, extra or misshapen tensor, or says which other model it seems to be, or that it predicts something else.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; models are not downloaded: give a .safetensors file or a folder in diffusers layout"
        )
    wanted = [component for component in COMPONENTS if component is not VAE or vae is None]
    sources = _folder_sources(path, wanted) if path.is_dir() else _single_file_sources(path, wanted)
    check_prediction(path, prediction or PredictionOptions())
    plans = _plan_all(path, sources)  # every fault is found before the first tensor is read
    dtypes = {VAE: vae_dtype or dtype}
    modules = {
        component: plans[component].fill(weights, dtypes.get(component, dtype), device) for component, (_, weights) in sources.items()
    }
    if vae is not None:
        modules[VAE] = load_vae(vae, dtype=vae_dtype or dtype, device=device)
    loaded = Loaded(unet=modules[UNET], vae=modules[VAE], text_encoder_1=modules[TEXT_1], text_encoder_2=modules[TEXT_2])
    _check_together(loaded, path)
    return loaded


def load_vae(path: Path | str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a VAE alone: from a file in the original layout (bare or inside a checkpoint), or a file or folder in diffusers layout."""
    planned, weights = planned_vae(Path(path))
    return planned.fill(weights, dtype, device)


def planned_vae(path: Path) -> tuple[Plan, Weights]:
    """The empty VAE that a file or folder describes, and its weights. Raises `ValueError` as `load_checkpoint` does."""
    if path.is_dir():
        component, weights = folder_weights(VAE, path / "vae" if (path / "vae").is_dir() else path)
    else:
        weights = Weights([path], MEANINGFUL)
        component = _vae_layout(path, weights)
        weights.check_plain(component.prefix)
    try:
        return plan(component, weights.under(component.prefix)), weights
    except ValueError as error:
        raise ValueError(f"{path}: not a complete VAE of SDXL\n{error}") from error


def single_file_state_dict(
    unet: nn.Module, vae: nn.Module, text_encoder_1: nn.Module, text_encoder_2: nn.Module, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of an original single file for these models, in `dtype`: the inverse of `load_checkpoint`."""
    modules = {UNET: unet, VAE: vae, TEXT_1: text_encoder_1, TEXT_2: text_encoder_2}
    table: dict[str, Tensor] = {}
    for component, module in modules.items():
        tensors = originals(module, component.sources(module))
        table |= {component.prefix + key: tensor.detach().to(dtype).contiguous() for key, tensor in tensors.items()}
    positions = table[TEXT_1.prefix + "embeddings.position_embedding.weight"].shape[0]
    table[TEXT_1.prefix + "embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)
    table[TEXT_2.prefix + "logit_scale"] = torch.tensor(LOGIT_SCALE, dtype=dtype)
    return table


# What stands where


def _single_file_sources(path: Path, wanted: list[Component]) -> dict[Component, tuple[Component, Weights]]:
    weights = Weights([path], MEANINGFUL)
    other = seems_to_be(weights.shapes)
    if other is not None:
        raise ValueError(f"{path}: not an SDXL checkpoint: {other}")
    weights.check_plain()
    prefixes = tuple(component.prefix for component in COMPONENTS)
    extra = [key for key in weights.shapes if not key.startswith(prefixes) and key not in MARKS]
    if extra:
        raise ValueError(f"{path}: holds {len(extra)} tensors that belong to no part of SDXL: {listing(extra)}")
    if VAE in wanted and not weights.under(VAE.prefix):
        raise ValueError(f"{path}: has no VAE (no tensor under '{VAE.prefix}'); give one with --vae")
    return {component: (component, weights) for component in wanted}


def _folder_sources(path: Path, wanted: list[Component]) -> dict[Component, tuple[Component, Weights]]:
    return {component: folder_weights(component, path / SUBFOLDERS[component]) for component in wanted}


def _plan_all(path: Path, sources: Mapping[Component, tuple[Component, Weights]]) -> dict[Component, Plan]:
    plans: dict[Component, Plan] = {}
    problems: list[str] = []
    for component, (source, weights) in sources.items():
        try:
            plans[component] = plan(source, weights.under(source.prefix))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{path}: not a complete SDXL checkpoint\n" + "\n".join(problems))
    return plans


def _vae_layout(path: Path, weights: Weights) -> Component:
    """The VAE as this file has it: its prefix and its names."""
    prefix = next((prefix for prefix in (VAE.prefix, "vae.", "") if prefix + "encoder.conv_in.weight" in weights.shapes), None)
    if prefix is None:
        other = seems_to_be(weights.shapes)
        raise ValueError(f"{path}: not a VAE of SDXL: it has no tensor 'encoder.conv_in.weight'" + (f"; {other}" if other else ""))
    if prefix + DIFFUSERS_VAE.block.format(0, 0) not in weights.shapes:
        return replace(VAE, prefix=prefix)
    return Component(VAE.title, prefix, lambda shapes: build_vae(vae_config(shapes, DIFFUSERS_VAE)), same_names)


def _check_together(loaded: Loaded, path: Path) -> None:
    """Do the parts fit each other? A mixed-up folder, or the VAE of another family, fails here and not in the first step."""
    unet, vae, text_1, text_2 = (_config(module) for module in (loaded.unet, loaded.vae, loaded.text_encoder_1, loaded.text_encoder_2))
    text = text_1["hidden_size"] + text_2["hidden_size"]
    pooled = unet["projection_class_embeddings_input_dim"] - SIZE_NUMBERS * SIZE_WIDTH
    claims = (
        (
            unet["cross_attention_dim"] == text,
            f"the U-Net attends to {unet['cross_attention_dim']} channels of text, the encoders give {text}",
        ),
        (pooled == text_2["projection_dim"], f"the U-Net takes a pooled text of {pooled}, encoder 2 gives {text_2['projection_dim']}"),
        (
            unet["in_channels"] == vae["latent_channels"],
            f"the U-Net takes {unet['in_channels']} channels, the VAE gives {vae['latent_channels']}",
        ),
        (vae["scaling_factor"] == LATENT_SCALE, f"the VAE scales its latents by {vae['scaling_factor']}, SDXL's by {LATENT_SCALE}"),
    )
    problems = [problem for holds, problem in claims if not holds]
    if problems:
        raise ValueError(f"{path}: its parts do not fit each other: {'; '.join(problems)}")


def _config(module: nn.Module) -> Mapping[str, Any]:
    config: Any = module.config
    return config.to_dict() if hasattr(config, "to_dict") else config
