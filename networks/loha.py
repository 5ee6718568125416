"""LoHa: dW = alpha/r * (w1_a @ w1_b) * (w2_a @ w2_b), the products multiplied elementwise.

Source: FedPara, proposition 1 (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098). Convolutions are flattened: fan-in is
inner channels times kernel positions.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from networks.base import Adapter, Dropouts
from networks.network import factory
from networks.selection import NetworkArguments


class LoHa(Adapter):
    """The Hadamard product of two products of rank `rank`: up to rank squared."""

    title = "LoHa"
    signature = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    boosted = ("hada_w2_a",)
    Arguments: ClassVar[type] = NetworkArguments

    def __init__(self, name: str, layer: nn.Module, *, rank: int, alpha: float, dropouts: Dropouts | None = None) -> None:
        super().__init__(name, layer, rank=rank, alpha=alpha, dropouts=dropouts)
        out, fan_in = self.shape.out, self.shape.fan_in
        self.hada_w1_a = nn.Parameter(torch.empty(out, rank))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, fan_in))
        self.hada_w2_a = nn.Parameter(torch.empty(out, rank))
        self.hada_w2_b = nn.Parameter(torch.empty(rank, fan_in))
        self.rank_space_is_cheaper = rank * rank * (out + fan_in) < out * fan_in

    @classmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "LoHa":
        if "hada_w1_b" not in tensors:
            raise ValueError(f"{name}: the file lacks hada_w1_b")
        adapter = cls(name, layer, rank=tensors["hada_w1_b"].shape[0], alpha=0)
        adapter.load(tensors)
        return adapter

    def initialise(self) -> None:
        nn.init.normal_(self.hada_w1_b, std=1.0)
        nn.init.normal_(self.hada_w1_a, std=0.1)
        nn.init.normal_(self.hada_w2_b, std=1.0)
        nn.init.zeros_(self.hada_w2_a)

    def formula(self) -> Tensor:
        first = self.wide(self.hada_w1_a) @ self.wide(self.hada_w1_b)
        return first * (self.wide(self.hada_w2_a) @ self.wide(self.hada_w2_b))

    def delta(self, x: Tensor) -> Tensor:
        """As a LoRA of rank r*r where that is cheaper, and always where ranks are dropped: only there is one to drop.

        (A1 B1) * (A2 B2) = U V with U[:, pq] = A1[:, p] A2[:, q] and V[pq, :] = B1[p, :] B2[q, :] (row-wise Khatri-Rao products).
        """
        shape, rank = self.shape, self.rank
        if shape.groups > 1 or not (self.rank_space_is_cheaper or self.drops_ranks):
            return super().delta(x)
        down = (self.hada_w1_b.unsqueeze(1) * self.hada_w2_b).reshape(rank * rank, shape.inner, *shape.kernel)
        up = (self.hada_w1_a.unsqueeze(2) * self.hada_w2_a.unsqueeze(1)).flatten(1)
        hidden = shape.apply(x, down) * self.scale
        if self.drops_ranks:  # independently in both products, so a pair (p, q) stays where both do
            pairs = self.kept(x, rank).unsqueeze(-1) * self.kept(x, rank).unsqueeze(-2)
            hidden = hidden * shape.along_channels(pairs.flatten(-2), hidden)
        return shape.mix(hidden, up)

    @property
    def dtype(self) -> torch.dtype:
        return self.hada_w1_b.dtype


create_network, create_network_from_weights = factory(LoHa)
