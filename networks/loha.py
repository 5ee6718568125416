"""LoHa: dW = alpha/r * (w1_a @ w1_b) * (w2_a @ w2_b), the products multiplied elementwise.

Source: FedPara, proposition 1 (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098); with Tucker cores for convolutions
proposition 3. Convolutions are flattened, fan-in being inner channels times kernel positions; a core t (r, r, *kernel) and `b` (r, inner)
together are a flat `b`, and `a` is then stored as (r, out): LyCORIS' layout.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from networks import dora
from networks.arguments import NetworkArguments
from networks.base import Adapter, Extras
from networks.factory import factory
from networks.layers import LayerShape, fold_core


class LoHa(Adapter):
    """The Hadamard product of two products of rank `rank`: up to rank squared."""

    title = "LoHa"
    signature = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    boosted = ("hada_w2_a",)
    folds_into = ("hada_w1_a",)
    Arguments: ClassVar[type] = NetworkArguments

    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def __init__(
        self, name: str, layer: nn.Module, *, rank: int, alpha: float, has_core: bool = False, extras: Extras | None = None
    ) -> None:
        super().__init__(name, layer, rank=rank, alpha=alpha, extras=extras)
        out, fan_in = self.shape.out, self.shape.fan_in
        left, right = ((rank, out), (rank, self.shape.inner)) if has_core else ((out, rank), (rank, fan_in))
        self.hada_w1_a = nn.Parameter(torch.empty(left))
        self.hada_w1_b = nn.Parameter(torch.empty(right))
        self.hada_w2_a = nn.Parameter(torch.empty(left))
        self.hada_w2_b = nn.Parameter(torch.empty(right))
        self.hada_t1 = nn.Parameter(torch.empty(rank, rank, *self.shape.kernel)) if has_core else None
        self.hada_t2 = nn.Parameter(torch.empty(rank, rank, *self.shape.kernel)) if has_core else None
        self.rank_space_is_cheaper = rank * rank * (out + fan_in) < out * fan_in

    @classmethod
    def designed(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: Any) -> "LoHa":
        has_core = arguments.use_tucker and not LayerShape.of(layer).is_pointwise
        return cls(name, layer, rank=rank, alpha=alpha, has_core=has_core, extras=Extras.asked(arguments))

    @classmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "LoHa":
        if "hada_w1_b" not in tensors:
            raise ValueError(f"{name}: the file lacks hada_w1_b")
        rank = tensors["hada_w1_b"].shape[0] if tensors["hada_w1_b"].dim() > 1 else 0
        if rank < 1:
            raise ValueError(f"{name}.hada_w1_b has the shape {list(tensors['hada_w1_b'].shape)}; a matrix was expected")
        has_core = "hada_t1" in tensors or "hada_t2" in tensors
        adapter = cls(name, layer, rank=rank, alpha=0, has_core=has_core, extras=Extras.found(name, LayerShape.of(layer), tensors))
        adapter.load(tensors)
        return adapter

    def initialise(self) -> None:
        nn.init.normal_(self.hada_w1_b, std=1.0)
        nn.init.normal_(self.hada_w1_a, std=0.1)
        nn.init.normal_(self.hada_w2_b, std=1.0)
        self.begin(self.hada_w2_a, lambda last: nn.init.normal_(last, std=0.1))
        for core in (self.hada_t1, self.hada_t2):
            if core is not None:
                nn.init.normal_(core, std=0.1)

    def formula(self) -> Tensor:
        a1, b1, a2, b2 = self._factors(wide=True)
        return (a1 @ b1) * (a2 @ b2)

    def delta(self, x: Tensor) -> Tensor:
        """As a LoRA of rank r*r where that is cheaper, and always where ranks are dropped: only there is one to drop."""
        shape, rank = self.shape, self.rank
        if shape.groups > 1 or not (self.rank_space_is_cheaper or self.drops_ranks):
            return super().delta(x)
        up, down = khatri_rao(*self._factors())
        hidden = shape.apply(x, down.reshape(rank * rank, shape.inner, *shape.kernel)) * self.coefficient
        if self.drops_ranks:  # independently in both products, so a pair (p, q) stays where both do
            pairs = self.kept(x, rank).unsqueeze(-1) * self.kept(x, rank).unsqueeze(-2)
            hidden = hidden * shape.along_channels(pairs.flatten(-2), hidden)
        return shape.mix(hidden, up)

    def overlap(self, weight: Tensor, axis: dora.Axis) -> dora.Overlap:
        if not self.rank_space_is_cheaper:
            return super().overlap(weight, axis)
        return dora.overlap_of_product(*khatri_rao(*self._factors(wide=True)), weight, axis)

    @property
    def dtype(self) -> torch.dtype:
        return self.hada_w1_b.dtype

    def _factors(self, wide: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a1 (out, r), b1 (r, fan-in), a2, b2, whether or not there are cores; `wide` in float32 or better."""
        stored = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        a1, b1, a2, b2 = map(self.wide, stored) if wide else stored
        if self.hada_t1 is None or self.hada_t2 is None:
            return a1, b1, a2, b2
        t1, t2 = (self.wide(self.hada_t1), self.wide(self.hada_t2)) if wide else (self.hada_t1, self.hada_t2)
        return a1.T, fold_core(t1, b1), a2.T, fold_core(t2, b2)


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(a1 b1) * (a2 b2) as one product up @ down of rank r1*r2: (out, r1*r2) and (r1*r2, ...), b being (r, ...).

    up[:, pq] = a1[:, p] a2[:, q] and down[pq] = b1[p] b2[q], the row-wise Khatri-Rao products. Exact.
    """
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    return up, (b1.unsqueeze(1) * b2).flatten(0, 1)


create_network, create_network_from_weights = factory(LoHa)
