"""The names of the throw-away family: one group of layers in each of its two models."""

from pathlib import Path
from typing import ClassVar

from torch import nn

from library.models.naming import Naming, Part, Target

MIXER = Part(name="mixer", prefix="lora_unet", is_denoiser=True, default_groups=("Mixer",))
WORDS = Part(name="words", prefix="lora_te", is_denoiser=False, default_groups=("Words",))


class MinuteNaming(Naming):
    """Every Linear under its own path."""

    name: ClassVar[str] = "minute"
    title: ClassVar[str] = "Minute"
    parts: ClassVar[tuple[Part, ...]] = (MIXER, WORDS)

    def recognises(self, denoiser: nn.Module) -> bool:
        """Whether this is the Mixer."""
        return type(denoiser).__name__ == "Mixer"

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        """The Linears of a model."""
        (group,) = part.default_groups
        paths = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        return [Target(name=f"{part.prefix}_{path}", path=path, module_path=path, group=group, container=group) for path in paths]

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        """The models of any checkpoint: all have one size."""
        from library.models.minute.spec import Mixer, Words  # pyright: ignore[reportMissingImports]

        return [(MIXER, Mixer().to("meta")), (WORDS, Words().to("meta"))]


NAMING = MinuteNaming()
