"""The four models of SDXL: where each stands in an original checkpoint, how it is built without memory, and how it is filled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.core.tensor_file import listing
from library.models.sdxl import configuration, keymap
from library.models.sdxl.configuration import Shapes
from library.models.sdxl.keymap import Source
from library.models.sdxl.weights import Weights


@dataclass(frozen=True)
class Component:
    """One of the four models: its prefix in the original file, and the way from shapes to an empty module and its sources."""

    title: str
    prefix: str
    build: Callable[[Shapes], nn.Module]  # parameters on the meta device; ValueError says what the shapes lack
    sources: Callable[[nn.Module], dict[str, Source]]


@dataclass(frozen=True)
class Plan:
    """An empty module, and where its tensors stand in the weights."""

    module: nn.Module
    prefix: str
    sources: dict[str, Source]

    def fill(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The module with its tensors, cast one by one so that a second copy of the whole never exists; frozen, in eval mode."""
        tensors = weights.read(self.prefix + source.key for source in self.sources.values())
        pairs = zip(self.sources.items(), tensors, strict=True)
        state = {name: source.form.read(tensor).to(device, dtype) for (name, source), tensor in pairs}
        self.module.load_state_dict(state, strict=True, assign=True)
        return self.module.to(device).eval().requires_grad_(False)  # .to moves the buffers that no file holds


def plan(component: Component, shapes: Shapes) -> Plan:
    """The module that these shapes (without the component's prefix) describe.

    Raises `ValueError` with every missing, extra and misshapen key.
    """
    try:
        module = component.build(shapes)
    except ValueError as error:
        raise ValueError(f"the {component.title} (under '{component.prefix}') {error}") from error
    sources = component.sources(module)
    if component is TEXT_2 and "text_projection.weight" in shapes:
        sources["text_projection.weight"] = Source("text_projection.weight")  # ComfyUI writes the matrix of a Linear
    problems = _mismatches(component, module, sources, shapes)
    if problems:
        raise ValueError("\n".join(problems))
    return Plan(module, component.prefix, sources)


# Empty modules


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


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with parameters on the meta device; unlike under `torch.device("meta")`, buffers such as CLIP's position ids are real."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return build()


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
)
COMPONENTS = (UNET, VAE, TEXT_1, TEXT_2)


# Checks


def _mismatches(component: Component, module: nn.Module, sources: Mapping[str, Source], shapes: Shapes) -> list[str]:
    state = module.state_dict()
    wanted = {source.key: source.form.shape(tuple(state[name].shape)) for name, source in sources.items()}
    missing = [component.prefix + key for key in wanted if key not in shapes]
    extra = [component.prefix + key for key in shapes if key not in wanted]
    misshapen = [
        f"{component.prefix}{key} {list(shapes[key])} for {list(shape)}"
        for key, shape in wanted.items()
        if key in shapes and not _fits(shapes[key], shape)
    ]
    found = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    return [f"{component.title}: {len(keys)} {what} tensors: {listing(keys)}" for what, keys in found if keys]


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1x1 convolution that a converter wrote as a matrix."""
    return found == wanted or (wanted[2:] == (1, 1) and found == wanted[:2])
