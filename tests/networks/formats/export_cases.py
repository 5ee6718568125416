"""A model of one layer under the names of a U-Net, exported; and what a reader makes of its output."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from library.models.naming import Naming, Part, Target
from networks.base import Adapter
from networks.members import Member
from networks.network import Network

PART = Part(name="unet", prefix="lora_unet", is_denoiser=True, default_groups=("Group",), comfyui_prefix="diffusion_model")
TARGET = Target(name="lora_unet_m", path="m", module_path="m", group="Group", container="", diffusers_path="unet.m")


class OneLayer(Naming):
    """The names of a model whose only layer is `m`."""

    name = "one"
    title = "One"
    parts = (PART,)

    def recognises(self, denoiser: nn.Module) -> bool:
        return True

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return [TARGET]

    def outline(self, checkpoint: Path | None = None) -> list[tuple[Part, nn.Module]]:
        return []


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.m = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def network_of(adapter: Adapter) -> Network:
    """The network that has this adapter only."""
    return Network([Member(adapter=adapter, part=PART, target=TARGET)], OneLayer(), [(PART, Model(adapter.layer))])


def output_error(reader: Callable[[Tensor], Tensor], adapter: Adapter, x: Tensor) -> float:
    """The error of the change of the output that a reader computes in float64, relative to that of the adapter's formula."""
    expected = adapter.shape.apply(x.double(), adapter.delta_weight().double())
    with torch.no_grad():
        change = reader(x.double()) - adapter.layer.double()(x.double())
    return float((change - expected).norm() / expected.norm())
