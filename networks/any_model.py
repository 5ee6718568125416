"""Layers by name in any torch model: what `target_modules` chooses from, with a family's names or without a family at all."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from library.models.naming import Naming, Part, Target, naming_named, naming_names, naming_of
from networks.patterns import Pattern

ALL_LINEAR = "all-linear"
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AnyModel(Naming):
    """The names of a model that no family recognises: those of its own modules, in their order."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = "this model"

    def __init__(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> None:
        """One part for the model itself, and one for each text encoder; adapters of a single one are named `lora_te_`."""
        self.title = type(denoiser).__name__  # pyright: ignore[reportAttributeAccessIssue]: a family has one title, this has one a model
        prefixes = ["lora_te"] if len(text_encoders) == 1 else [f"lora_te{number + 1}" for number in range(len(text_encoders))]
        self.parts = (  # pyright: ignore[reportAttributeAccessIssue]: as above
            Part(name="model", prefix="lora_unet", is_denoiser=True, default_groups=()),
            *(
                Part(name=f"text encoder {number + 1}", prefix=prefix, is_denoiser=False, default_groups=())
                for number, prefix in enumerate(prefixes)
            ),
        )

    def recognises(self, denoiser: nn.Module) -> bool:
        """Any model is one."""
        return True

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        """Every Linear and Conv layer, except the output projections of `nn.MultiheadAttention`, which are never called."""
        return [
            Target(name=_adapter_name(part.prefix, path), path=path, module_path=path, group="", container="")
            for path, layer in module.named_modules()
            if is_adaptable(layer)
        ]

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        """Raises `ValueError`: there is nothing to know the structure from."""
        raise ValueError("a model of no known family has no outline; load the adapter with the model itself")


def naming_for(denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> Naming:
    """The names of the family that recognises the denoiser, or the model's own."""
    return naming_of(denoiser) or AnyModel(denoiser, text_encoders)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a layer can have an adapter: Linear, Conv1d, Conv2d, Conv3d, and subclasses."""
    return isinstance(layer, ADAPTABLE) and not isinstance(layer, NonDynamicallyQuantizableLinear)


def chosen_by(entries: Iterable[Pattern], target: Target, layer: nn.Module) -> list[Pattern]:
    """The entries of target_modules that choose a layer: by name, by the end of its name after a dot, or as a regex."""
    return [entry for entry in entries if _chooses(entry, target, layer)]


def found_in(parts: Iterable[tuple[Part, nn.Module]], title: str) -> str:
    """What there is to choose from, for a model of no known family."""
    families = ", ".join(naming_named(name).title for name in naming_names())
    contents = "; ".join(_contents(part, module) for part, module in parts)
    return (
        f"a {title} of this structure is no model family that Hadron knows ({families}); name the layers to adapt, for example "
        f"--network_args \"target_modules=['to_q', 'to_k']\" (names, their ends, or regexes), or target_modules={ALL_LINEAR}; {contents}"
    )


def _adapter_name(prefix: str, path: str) -> str:
    """Of a dotted path, which is empty for a model that is itself a layer."""
    return f"{prefix}_{path.replace('.', '_')}" if path else prefix


def _chooses(entry: Pattern, target: Target, layer: nn.Module) -> bool:
    text = entry.regex.pattern
    if text == ALL_LINEAR:
        return isinstance(layer, nn.Linear)
    ending = f".{text}"
    is_named = any(path == text or path.endswith(ending) for path in (target.path, target.module_path))
    return is_named or entry.matches(target.path, target.module_path)


def _contents(part: Part, module: nn.Module) -> str:
    """One sentence: how many layers of which class, with an example each, and the ends of their names by frequency."""
    layers = {path: layer for path, layer in module.named_modules() if is_adaptable(layer)}
    if not layers:
        return f"the {part.name} ({type(module).__name__}) has no Linear or Conv layer"
    kinds: dict[str, list[str]] = {}
    for path, layer in layers.items():
        kinds.setdefault(type(layer).__name__, []).append(path)
    counts = ", ".join(f"{len(paths)} {kind} (such as '{paths[0]}')" for kind, paths in kinds.items())
    ends = ", ".join(f"{end} ({count})" for end, count in Counter(map(_ending, layers)).most_common(12))
    return f"the {part.name} ({type(module).__name__}) has {counts}; names end in {ends}"


def _ending(path: str) -> str:
    """The end of a dotted name that tells layers apart: the last word, with what stands before numbers (`to_out.0`)."""
    match = re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", path)
    return match.group() if match else path
