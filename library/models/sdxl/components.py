"""The four models of SDXL: where each stands in an original checkpoint, and how it is built without memory."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from library.models.filling import Component, Source, empty
from library.models.sdxl import configuration, keymap


def build_unet(config: Mapping[str, Any]) -> nn.Module:
    """An empty `UNet2DConditionModel`."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return empty(lambda: UNet2DConditionModel(**config))


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """An empty `AutoencoderKL`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return empty(lambda: AutoencoderKL(**config))


def build_text_1(config: Mapping[str, Any]) -> nn.Module:
    """An empty `CLIPTextModel`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return empty(lambda: CLIPTextModel(CLIPTextConfig(**config)))


def build_text_2(config: Mapping[str, Any]) -> nn.Module:
    """An empty `CLIPTextModelWithProjection`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return empty(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)))


UNET = Component("U-Net", "model.diffusion_model.", lambda s: build_unet(configuration.unet_config(s)), keymap.unet_sources)
VAE = Component("VAE", "first_stage_model.", lambda s: build_vae(configuration.vae_config(s)), keymap.vae_sources)
TEXT_1 = Component(
    "text encoder 1",
    "conditioner.embedders.0.transformer.text_model.",
    lambda s: build_text_1(configuration.text_config_1(s)),
    keymap.text_sources_1,
)
TEXT_2 = Component(
    "text encoder 2",
    "conditioner.embedders.1.model.",
    lambda s: build_text_2(configuration.text_config_2(s)),
    keymap.text_sources_2,
    variants=(("text_projection.weight", Source("text_projection.weight")),),  # ComfyUI writes the matrix of a Linear
)
COMPONENTS = (UNET, VAE, TEXT_1, TEXT_2)
