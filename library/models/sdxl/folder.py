"""SDXL in diffusers layout: folders with a `config.json` and safetensors, one folder a model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from library.models.filling import Component, Source, empty, same_names
from library.models.folders import built, read_config, weight_files
from library.models.sdxl.components import TEXT_1, TEXT_2, UNET, VAE
from library.models.sdxl.keymap import text_level
from library.models.weights import Weights

SUBFOLDERS = {UNET: "unet", VAE: "vae", TEXT_1: "text_encoder", TEXT_2: "text_encoder_2"}
LAYOUT = "an SDXL folder in diffusers layout has unet, vae, text_encoder and text_encoder_2"


def folder_weights(component: Component, folder: Path) -> tuple[Component, Weights]:
    """The component and the weights of one model's folder. Raises `ValueError` that names what the folder lacks."""
    wanted = _CLASSES[component]
    config = read_config(folder, (wanted, "CLIPModel"), f"the {component.title} of SDXL", LAYOUT)
    is_text = component in (TEXT_1, TEXT_2)
    weights = Weights(weight_files(folder), _without_level if is_text else lambda key: key)
    weights.check_plain()
    return Component(
        component.title, "", lambda _: built(folder, _BUILDERS[component], config), _text_names if is_text else same_names
    ), weights


def _without_level(key: str) -> str | None:
    return None if key.endswith("position_ids") else key.removeprefix("text_model.")


def _text_names(encoder: nn.Module) -> dict[str, Source]:
    return {key: Source(key.removeprefix(text_level(encoder))) for key in encoder.state_dict()}


# Builders


def _unet(config: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if config.get("addition_embed_type") != "text_time":
        raise ValueError("takes no size conditioning: it is a Stable Diffusion 1.x or 2.x U-Net")
    return empty(lambda: cast(nn.Module, UNet2DConditionModel.from_config(dict(config))))


def _vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return empty(lambda: cast(nn.Module, AutoencoderKL.from_config(dict(config))))


def _text_1(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextModel

    return empty(lambda: CLIPTextModel(_text_config(config)))


def _text_2(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    return empty(lambda: CLIPTextModelWithProjection(_text_config(config)))


def _text_config(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig.from_dict(dict(config))


_CLASSES = {UNET: "UNet2DConditionModel", VAE: "AutoencoderKL", TEXT_1: "CLIPTextModel", TEXT_2: "CLIPTextModelWithProjection"}
_BUILDERS: dict[Component, Callable[[Mapping[str, Any]], nn.Module]] = {UNET: _unet, VAE: _vae, TEXT_1: _text_1, TEXT_2: _text_2}
