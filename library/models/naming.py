"""The names of a family's adaptable layers: all that networks need to know of a family.

Each family folder beside this file has a `names.py` with a `Naming`, exported there as `NAMING`. Adapters, their files and tools reach
it through `naming_named` (by name) or `naming_of` (by the model in hand, whichever library's classes it is made of).
"""

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer that an adapter may change, from the family's canonical table."""

    name: str  # adapter name, prefix included: lora_unet_input_blocks_4_1_proj_in
    path: str  # dotted path in the original checkpoint; what user patterns see
    module_path: str  # dotted path in the class of the model at hand
    group: str  # documented container: Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D, CLIPAttention, CLIPMLP, ...
    container: str  # dotted path of that container in the original checkpoint; `path` lies below it
    diffusers_path: str = ""  # component and dotted path in a diffusers pipeline: unet.down_blocks.1.attentions.0.proj_in


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a denoiser as block-wise tables of sd-scripts count them."""

    count: int
    down: range
    mid: range
    up: range
    number: Callable[[str], int]  # of a canonical path


@dataclass(frozen=True, kw_only=True)
class Part:
    """One adaptable model of a family: the denoiser or a text encoder."""

    name: str  # for messages: unet, text encoder 1
    prefix: str  # of adapter names: lora_unet, lora_te1
    is_denoiser: bool
    default_groups: tuple[str, ...]  # adapted without being asked
    conv_groups: tuple[str, ...] = ()  # adapted as well once conv_dim is given
    extra_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # network argument -> groups that it turns on
    default_excludes: tuple[str, ...] = ()  # regexes (fullmatch on `path`)
    comfyui_prefix: str = ""  # before `path` in ComfyUI's dotted names: diffusion_model, text_encoders.clip_l.transformer
    other_prefixes: tuple[str, ...] = ()  # what other tools write before a path, dotted: unet, transformer, lycoris, base_model.model
    blocks: Blocks | None = None


class Naming(ABC):
    """The names of one family. Instances hold no state."""

    name: ClassVar[str]  # folder name: sdxl
    title: ClassVar[str]  # for messages: SDXL
    parts: ClassVar[tuple[Part, ...]]  # denoiser first, then the text encoders in order

    @abstractmethod
    def recognises(self, denoiser: nn.Module) -> bool:
        """Is this model the family's denoiser (by structure, not by one generic class name)?"""

    @abstractmethod
    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        """The canonical table of `part` for this very module, in the order that fixes files and initialisation."""

    @abstractmethod
    def outline(self, part: Part) -> nn.Module:
        """The model of `part` at full size on the meta device, for tools that have an adapter file but no model."""


def naming_names() -> list[str]:
    """The families there are: the folders beside this file that have names, in alphabetical order."""
    import library.models

    folders = sorted(module.name for module in pkgutil.iter_modules(library.models.__path__) if module.ispkg)
    return [name for name in folders if importlib.util.find_spec(f"library.models.{name}.names") is not None]


def naming_named(name: str) -> Naming:
    """The names of the family in the folder `name`. Raises `ValueError` for an unknown one."""
    if name not in naming_names():
        raise ValueError(f"unknown model family '{name}'; there are: {', '.join(naming_names())}")
    return importlib.import_module(f"library.models.{name}.names").NAMING


def naming_of(denoiser: nn.Module) -> Naming | None:
    """The names of the family that recognises this denoiser, or None."""
    return next((naming for naming in map(naming_named, naming_names()) if naming.recognises(denoiser)), None)
