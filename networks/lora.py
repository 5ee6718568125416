"""LoRA: dW = alpha/r * up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).

Convolutions: `down` has the layer's kernel, `up` is 1x1; the product of flattened matrices is the same formula. With a Tucker core
(`use_tucker`, file name `lora_mid`, r x r x kernel) `down` is 1x1 too, and core and down together are the flat `down`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from networks import dora, row_blocks
from networks.arguments import NetworkArguments
from networks.base import Adapter
from networks.extras import Extras
from networks.factory import factory
from networks.kernels.cost import FUSED, MATERIALISE, LowRankWays
from networks.kernels.low_rank import low_rank
from networks.kernels.materialised import Product, materialised
from networks.kernels.products import Base, cast
from networks.layers import LayerShape, fold_core


class Factor(nn.Module):
    """Holds one matrix under the name `<attribute>.weight`, as files spell LoRA's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class LoRA(Adapter):
    """The sum of `rank` outer products."""

    title = "LoRA"
    signature = ("lora_down.weight", "lora_mid.weight", "lora_up.weight")
    boosted = ("lora_up",)
    folds_into = ("lora_up.weight",)
    Arguments: ClassVar[type] = NetworkArguments

    def __init__(
        self, name: str, layer: nn.Module, *, rank: int, alpha: float, has_core: bool = False, extras: Extras | None = None
    ) -> None:
        super().__init__(name, layer, rank=rank, alpha=alpha, extras=extras)
        shape, ones = self.shape, (1,) * len(self.shape.kernel)
        self.lora_down = Factor(rank, shape.inner, *(ones if has_core else shape.kernel))
        self.lora_mid = Factor(rank, rank, *shape.kernel) if has_core else None
        self.lora_up = Factor(shape.out, rank, *ones)

    @classmethod
    def designed(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: Any) -> "LoRA":
        has_core = arguments.use_tucker and not LayerShape.of(layer).is_pointwise
        return cls(name, layer, rank=rank, alpha=alpha, has_core=has_core, extras=Extras.asked(arguments))

    @classmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "LoRA":
        if "lora_down.weight" not in tensors:
            raise ValueError(f"{name}: the file lacks lora_down.weight")
        rank = tensors["lora_down.weight"].shape[0] if tensors["lora_down.weight"].dim() > 1 else 0
        if rank < 1:
            raise ValueError(f"{name}.lora_down.weight has the shape {list(tensors['lora_down.weight'].shape)}; a matrix was expected")
        extras = Extras.found(name, LayerShape.of(layer), tensors)
        adapter = cls(name, layer, rank=rank, alpha=0, has_core="lora_mid.weight" in tensors, extras=extras)
        adapter.load(tensors)
        return adapter

    def initialise(self) -> None:
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        if self.lora_mid is not None:
            nn.init.kaiming_uniform_(self.lora_mid.weight, a=math.sqrt(5))
        self.begin(self.lora_up.weight, lambda up: nn.init.kaiming_uniform_(up, a=math.sqrt(5)))

    def formula(self) -> Tensor:
        up, down = self._factors()
        return up @ down

    def delta(self, x: Tensor, base: Base | None = None) -> Tensor:
        shape = self.shape
        way = "" if self.drops_ranks else self.way(x, base)
        if way.startswith(MATERIALISE):
            up, down = self._factors()
            return materialised(x, (self.scaled(up), down), Product(), self.scale, shape, base)
        own: Any = self._modules  # past Module.__getattr__, which is slow
        down, up = own["lora_down"]._parameters["weight"], self.scaled(own["lora_up"]._parameters["weight"])
        if self.lora_mid is None and way:
            return low_rank(x, (down, up), self.scale, shape, base, is_fused=way.endswith(FUSED))
        return self.onto(base, x, self._in_turn(x, down, up))

    @property
    def ways(self) -> LowRankWays:
        return LowRankWays(self.shape.out, self.shape.fan_in, self.rank)

    def rows(self) -> row_blocks.Product:
        return row_blocks.Product(*self._factors())

    def overlap(self, weight: Tensor, axis: dora.Axis) -> dora.Overlap:
        return dora.overlap_of_product(*self._factors(), weight, axis)

    @property
    def dtype(self) -> torch.dtype:
        return self.lora_down.weight.dtype

    def _in_turn(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """The delta step by step, for a core and for ranks that are dropped."""
        shape = self.shape
        down, up = cast(x.dtype, down, up)
        core = None if self.lora_mid is None else self.lora_mid.weight.to(x.dtype)
        hidden = shape.apply(x, down) if core is None else shape.apply(shape.mix(x, down), core)
        if self.drops_ranks:
            hidden = hidden * shape.along_channels(self.kept(x, self.rank), hidden)
        return shape.mix(hidden * self.scale, up)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """`up` (out, r) and `down` (r, inner * kernel), in float32 or better."""
        up, down = self.wide(self.lora_up.weight).flatten(1), self.wide(self.lora_down.weight)
        if self.lora_mid is None:
            return up, down.flatten(1)
        return up, fold_core(self.wide(self.lora_mid.weight), down)


create_network, create_network_from_weights = factory(LoRA)
