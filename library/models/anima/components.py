"""The models of Anima: where each stands in the original files, and how it is built without memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.models.anima import configuration, keymap, lookalikes
from library.models.anima.names import ADAPTER
from library.models.filling import Component, empty, same_names
from library.models.lookalikes import Lookalike

CONSTANTS = (
    re.compile(  # tensors that carry nothing: state of other trainers, tables that the classes make, the tied head of a language model
        r".*\b_extra_state|.*\baccum_\w+|(.*\.)?pos_embedder\..*|.*\binv_freq|(.*\.)?lm_head\.weight"
    )
)
DIT_PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "model.", "")
ENCODER_PREFIXES = ("", "model.", "text_encoders.qwen3_06b.transformer.model.")
VAE_PREFIXES = ("", "vae.", "first_stage_model.")
PARTS = ("net.", "model.diffusion_model.", "diffusion_model.", "text_encoders.", "vae.", "first_stage_model.")  # of files that hold several
UNUSED = ("net_ema.", "model_ema.")  # weights that the model in use has no place for


@dataclass(frozen=True)
class Marked:
    """One layout of a component in single files: the prefixes that it may have there, a key by which it is known, and its kind of file."""

    component: Component
    prefixes: tuple[str, ...]
    mark: str
    kind: Lookalike


def build_transformer(config: Mapping[str, Any]) -> nn.Module:
    """An empty `CosmosTransformer3DModel` with Anima's facts."""
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    return empty(lambda: CosmosTransformer3DModel(**configuration.TRANSFORMER_FACTS | dict(config)))


def build_conditioner(config: Mapping[str, Any]) -> nn.Module:
    """An empty `AnimaTextConditioner`."""
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

    return empty(lambda: AnimaTextConditioner(**config))


def build_encoder(config: Mapping[str, Any]) -> nn.Module:
    """An empty `Qwen3Model` with the facts of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3Model

    return empty(lambda: Qwen3Model(Qwen3Config(**configuration.ENCODER_FACTS | dict(config))))


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """An empty `AutoencoderKLQwenImage`."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    return empty(lambda: AutoencoderKLQwenImage(**config))


TRANSFORMER = Component("transformer", "", lambda s: build_transformer(configuration.transformer_size(s)), keymap.transformer_sources)
CONDITIONER = Component("llm adapter", "", lambda s: build_conditioner(configuration.conditioner_size(s)), same_names)
ENCODER = Component("text encoder", "", lambda s: build_encoder(configuration.encoder_size(s)), same_names)
VAE = Component("VAE", "", lambda s: build_vae(configuration.vae_size(s)), keymap.vae_sources)
DIFFUSERS_VAE = Component("VAE", "", lambda s: build_vae(configuration.vae_size(s, configuration.DIFFUSERS_VAE)), same_names)

DIT_LAYOUTS = (Marked(TRANSFORMER, DIT_PREFIXES, "x_embedder.proj.1.weight", lookalikes.DIT),)
ADAPTER_LAYOUTS = (
    Marked(
        CONDITIONER,
        (*(f"{prefix}{ADAPTER}." for prefix in DIT_PREFIXES), "text_conditioner.", ""),
        "blocks.0.norm_cross_attn.weight",
        lookalikes.ADAPTER,
    ),
)
ENCODER_LAYOUTS = (Marked(ENCODER, ENCODER_PREFIXES, "layers.0.self_attn.q_norm.weight", lookalikes.ENCODER),)
VAE_LAYOUTS = (
    Marked(VAE, VAE_PREFIXES, configuration.ORIGINAL_VAE.convolution.format(0), lookalikes.VAE),
    Marked(DIFFUSERS_VAE, VAE_PREFIXES, configuration.DIFFUSERS_VAE.convolution.format(0), lookalikes.VAE),
)
