"""A model of one layer under the names of a U-Net, with every algorithm and mode on every kind of layer, to be exported."""

from collections.abc import Callable
from typing import Any

import one_layer
import torch
from adapter_cases import CASES as ADAPTER_CASES
from adapter_cases import KINDS, filled
from torch import Tensor, nn

from library.models.naming import Part, Target
from networks.base import Adapter
from networks.members import Member
from networks.network import Network

NAME = "lora_unet_m"
PART = Part(name="unet", prefix="lora_unet", is_denoiser=True, default_groups=("Group",), comfyui_prefix="diffusion_model")
TARGET = Target(name=NAME, path="m", module_path="m", group="Group", container="", diffusers_path="unet.m")
CASES = {key: case for key, case in ADAPTER_CASES.items() if "reflect" not in key}  # readers ignore padding modes


class OneLayer(one_layer.OneLayer):
    """The names of a model whose only layer is `m`, a layer of a U-Net to writers."""

    parts = (PART,)

    def targets(self, part: Part, module: nn.Module) -> list[Target]:
        return [TARGET]


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.m = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def case_named(key: str) -> tuple[Adapter, Tensor]:
    """The adapter of a case, as after training, and an input for its layer."""
    algorithm, rank, kind, arguments = CASES[key]
    torch.manual_seed(1)
    layer = nn.Linear(18, 12, bias=False) if kind == "linear-5d" else KINDS[kind].make()  # LyCORIS knows subclasses only as quantised
    adapter = filled(algorithm.fresh(NAME, layer.requires_grad_(False), rank, 1.5, algorithm.Arguments(**arguments)))
    return adapter.eval(), torch.randn(KINDS[kind].input_shape)


def network_of(adapter: Adapter) -> Network:
    """The network that has this adapter only."""
    return Network([Member(adapter=adapter, part=PART, target=TARGET)], OneLayer(), [(PART, Model(adapter.layer))])


def own_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the layer in a file with kohya's names, by parameter."""
    return {key.removeprefix(f"{NAME}."): tensor for key, tensor in tensors.items()}


def output_error(reader: Callable[[Tensor], Any], adapter: Adapter, x: Tensor) -> float:
    """The error of the change of the output that a reader computes in float64, relative to that of the adapter's formula."""
    with torch.no_grad():
        expected = adapter.shape.apply(x.double(), adapter.delta_weight().double())
        change = reader(x.double()) - adapter.layer.double()(x.double())
    return float((change - expected).norm() / expected.norm())
