"""LoRA: dW = alpha/r * up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).

Convolutions: `down` has the layer's kernel, `up` is 1x1. The bare product of matrices is the same formula on flattened kernels.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from networks.base import Adapter, Dropouts
from networks.network import factory
from networks.selection import NetworkArguments


class Factor(nn.Module):
    """Holds one matrix under the name `<attribute>.weight`, as files spell LoRA's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class LoRA(Adapter):
    """The sum of `rank` outer products."""

    title = "LoRA"
    signature = ("lora_down.weight", "lora_up.weight")
    boosted = ("lora_up",)
    Arguments: ClassVar[type] = NetworkArguments

    def __init__(self, name: str, layer: nn.Module, *, rank: int, alpha: float, dropouts: Dropouts | None = None) -> None:
        super().__init__(name, layer, rank=rank, alpha=alpha, dropouts=dropouts)
        shape = self.shape
        self.lora_down = Factor(rank, shape.inner, *shape.kernel)
        self.lora_up = Factor(shape.out, rank, *(1 for _ in shape.kernel))

    @classmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "LoRA":
        if "lora_down.weight" not in tensors:
            raise ValueError(f"{name}: the file lacks lora_down.weight")
        adapter = cls(name, layer, rank=tensors["lora_down.weight"].shape[0], alpha=0)
        adapter.load(tensors)
        return adapter

    def initialise(self) -> None:
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def formula(self) -> Tensor:
        return self.wide(self.lora_up.weight).flatten(1) @ self.wide(self.lora_down.weight).flatten(1)

    def delta(self, x: Tensor) -> Tensor:
        if self.shape.groups > 1:
            return super().delta(x)
        hidden = self.shape.apply(x, self.lora_down.weight) * self.scale
        if self.drops_ranks:
            hidden = hidden * self.shape.along_channels(self.kept(x, self.rank), hidden)
        return self.shape.mix(hidden, self.lora_up.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.lora_down.weight.dtype


create_network, create_network_from_weights = factory(LoRA)
