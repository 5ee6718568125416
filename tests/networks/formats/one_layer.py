"""A model of one layer with names, for reading files that were written for one."""

from pathlib import Path

from torch import Tensor, nn

from library.models.naming import Naming, Part, Target
from networks.base import Adapter
from networks.files import AdapterFile
from networks.formats.peft_config import PeftConfig
from networks.formats.reader import read_members

PART = Part(name="model", prefix="lora_unet", is_denoiser=True, default_groups=("One",))


class OneLayer(Naming):
    """The names of a model whose only layer is `m`."""

    name = "one"
    title = "One"
    parts = (PART,)

    def recognises(self, denoiser: nn.Module) -> bool:
        return True

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return [Target(name="lora_unet_m", path="m", module_path="m", group="One", container="")]

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        return []


def read_one(layer: nn.Module, tensors: dict[str, Tensor], config: dict | None = None) -> Adapter:
    """The adapter that tensors mean on `layer`, with PEFT's configuration beside them."""
    configs = {} if config is None else {"": PeftConfig.of(config, "adapter_config.json")}
    (member,) = read_members(AdapterFile(tensors=tensors, config=configs), OneLayer(), [(PART, nn.ModuleDict({"m": layer}))])
    return member.adapter
