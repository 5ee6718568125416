"""Anima in diffusers layout: a folder with transformer, text_conditioner, text_encoder and vae, or the folder of one of the latter two."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from library.models.anima import configuration
from library.models.anima.components import CONDITIONER, CONSTANTS, ENCODER, TRANSFORMER, VAE
from library.models.filling import Component, empty, same_names
from library.models.folders import built, read_config, weight_files
from library.models.weights import Weights

LAYOUT = "an Anima folder in diffusers layout has transformer, text_conditioner, text_encoder and vae"
SUBFOLDERS = {TRANSFORMER: "transformer", CONDITIONER: "text_conditioner", ENCODER: "text_encoder", VAE: "vae"}


def subfolder(component: Component, folder: Path) -> Path:
    """The folder of this model: below `folder`, or `folder` itself."""
    below = folder / SUBFOLDERS[component]
    return below if below.is_dir() or component is TRANSFORMER else folder


def folder_component(component: Component, folder: Path) -> Component:
    """The component as the `config.json` in its folder describes it. Raises `ValueError` naming that file."""
    config = read_config(folder, _CLASSES[component], f"the {component.title} of Anima", LAYOUT)
    return replace(component, prefix="", build=lambda _: built(folder, _BUILDERS[component], config), sources=same_names)


def folder_weights(folder: Path) -> Weights:
    """The tensors in the folder of one model; those of a causal language model without its level `model.`."""
    weights = Weights(weight_files(folder), lambda key: None if CONSTANTS.fullmatch(key) else key.removeprefix("model."))
    weights.check_plain()
    return weights


# Builders


def _transformer(config: Mapping[str, Any]) -> nn.Module:
    """With the padding mask as one of its inputs, as in a single file, wherever diffusers counts it."""
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    mask = int(config.get("concat_padding_mask", True))
    facts = configuration.TRANSFORMER_FACTS | {"in_channels": config.get("in_channels", configuration.LATENT_CHANNELS) + mask}
    facts["rope_scale"] = tuple(config.get("rope_scale", facts["rope_scale"]))
    return empty(lambda: cast(nn.Module, CosmosTransformer3DModel.from_config(dict(config) | facts)))


def _conditioner(config: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

    return empty(lambda: cast(nn.Module, AnimaTextConditioner.from_config(dict(config))))


def _encoder(config: Mapping[str, Any]) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return empty(lambda: Qwen3Model(Qwen3Config.from_dict(dict(config))))


def _vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

    module = empty(lambda: cast(nn.Module, AutoencoderKLQwenImage.from_config(dict(config))))
    sizes = cast(Any, module).config
    configuration.check_latents(sizes["z_dim"], len(sizes["dim_mult"]))
    return module


_CLASSES = {
    TRANSFORMER: ("CosmosTransformer3DModel",),
    CONDITIONER: ("AnimaTextConditioner",),
    ENCODER: ("Qwen3Model", "Qwen3ForCausalLM"),
    VAE: ("AutoencoderKLQwenImage",),
}
_BUILDERS: dict[Component, Callable[[Mapping[str, Any]], nn.Module]] = {
    TRANSFORMER: _transformer,
    CONDITIONER: _conditioner,
    ENCODER: _encoder,
    VAE: _vae,
}
