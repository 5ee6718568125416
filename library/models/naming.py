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
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer that an adapter may change, from the family's canonical table."""

    name: str  # adapter name, prefix included: lora_unet_input_blocks_4_1_proj_in
    path: str  # dotted path in the original checkpoint; what user patterns see
    module_path: str  # dotted path in the class of the model at hand
    group: str  # documented container: Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D, CLIPAttention, CLIPMLP, ...
    container: str  # dotted path of that container in the original checkpoint; `path` lies below it
    diffusers_path: str = ""  # component and dotted path in a diffusers pipeline: unet.down_blocks.1.attentions.0.proj_in
    other_paths: tuple[str, ...] = ()  # dotted paths in other versions of the library


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
    other_prefixes: tuple[str, ...] = ()  # what other tools write before a path, dotted: unet, transformer, lycoris
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Place:
    """Where a tensor of a model stands in a checkpoint.

    `view` is a view of the stored tensor in the model's shape (the caller checks that it has): reading is looking at it, changing is
    writing through it. The keys of a diffusers folder are `<component>/<key in its files>`.
    """

    key: str
    view: Callable[[Tensor], Tensor] = lambda stored: stored
    others: tuple["Place", ...] = ()  # where other checkpoints have it; the first that a file holds counts


class Naming(ABC):
    """The names of one family. Instances hold no state."""

    name: ClassVar[str]  # folder name: sdxl
    title: ClassVar[str]  # for messages: SDXL
    parts: ClassVar[tuple[Part, ...]]  # denoiser first, then the text encoders in order
    network_aliases: ClassVar[Mapping[str, str]] = {}  # names that sd-scripts has for a network module of this family -> the module
    marks: ClassVar[tuple[str, ...]] = ()  # regexes that find this family's names in those of any tool, dots written as underscores

    @abstractmethod
    def recognises(self, denoiser: nn.Module) -> bool:
        """Is this model the family's denoiser (by structure, not by one generic class name)?"""

    @abstractmethod
    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        """The canonical table of `part` for this very module, in the order that fixes files and initialisation."""

    def places(self, part: Part, module: nn.Module) -> dict[str, Place]:
        """The place in a checkpoint of every `<module_path>.weight` and `.bias` of this module; here the names of its state dict."""
        names = [name for name in module.state_dict() if name.rpartition(".")[2] in ("weight", "bias")]
        return {name: Place(name) for name in names}

    def outside(self, part: Part, module: nn.Module) -> list[Target]:
        """The layers with a weight that the table does not list, though other tools adapt them: embeddings, ends, norms.

        Here by their module paths; a family whose module paths differ from its canonical ones says what those are.
        """
        known = {target.module_path for target in self.targets(part, module)}
        return [plain_target(part, path) for path in weighted(module) if path not in known]

    @abstractmethod
    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        """The family's adaptable models without their weights (on the meta device), for tools that have an adapter file but no model.

        At full size, or as the header of `checkpoint` (a single file or a diffusers folder) describes them; a part that it does not
        hold is at full size. Raises `ValueError` for a checkpoint of another family.
        """


def plain_target(
    part: Part, path: str, module_path: str | None = None, diffusers_path: str = "", other_paths: tuple[str, ...] = ()
) -> Target:
    """A layer that no group lists."""
    return Target(
        name=f"{part.prefix}_{path.replace('.', '_')}",
        path=path,
        module_path=module_path or path,
        group="",
        container="",
        diffusers_path=diffusers_path,
        other_paths=other_paths,
    )


def weighted(module: nn.Module) -> list[str]:
    """The paths of the layers that have a weight of their own."""
    return [path for path, layer in module.named_modules() if path and isinstance(getattr(layer, "weight", None), Tensor)]


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


def network_aliases() -> dict[str, str]:
    """The names that sd-scripts has for network modules of single families, and the modules that do their work here."""
    return {alias: module for name in naming_names() for alias, module in naming_named(name).network_aliases.items()}


def group_switches() -> set[str]:
    """The network arguments that turn on groups of layers in any family."""
    return {switch for name in naming_names() for part in naming_named(name).parts for switch in part.extra_groups}


def naming_of(denoiser: nn.Module) -> Naming | None:
    """The names of the family that recognises this denoiser, or None."""
    return next((naming for naming in map(naming_named, naming_names()) if naming.recognises(denoiser)), None)
