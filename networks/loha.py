"""LoHa: dW = alpha/r * (w1_a @ w1_b) * (w2_a @ w2_b), the products multiplied elementwise.

Source: FedPara, proposition 1 (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098); with Tucker cores for convolutions
proposition 3. Convolutions are flattened, fan-in being inner channels times kernel positions; a core t (r, r, *kernel) and `b` (r, inner)
together are a flat `b`, and `a` is then stored as (r, out): LyCORIS' layout.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from networks import dora, row_blocks
from networks.arguments import NetworkArguments
from networks.base import Adapter
from networks.extras import Extras
from networks.factory import factory
from networks.kernels.cost import FUSED, MATERIALISE, HadamardWays
from networks.kernels.low_rank import khatri_rao, low_rank
from networks.kernels.materialised import FusedHadamard, Hadamard, materialised
from networks.kernels.products import Base, cast
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

    def delta(self, x: Tensor, base: Base | None = None) -> Tensor:
        """As a LoRA of rank r*r or by the whole weight, whichever is cheaper; where ranks are dropped as the first: it has them."""
        shape = self.shape
        a1, b1, a2, b2 = self._factors()
        factors = (self.scaled(a1), b1, a2, b2)
        if self.drops_ranks:
            return self.onto(base, x, self._dropped(x, factors))
        way = self.way(x, base)
        is_fused = way.endswith(FUSED)
        if way.startswith(MATERIALISE):
            return materialised(x, factors, FusedHadamard() if is_fused else Hadamard(), self.scale, shape, base)
        return low_rank(x, factors, self.scale, shape, base, is_fused=is_fused)

    @property
    def ways(self) -> HadamardWays:
        return HadamardWays(self.shape.out, self.shape.fan_in, self.rank)

    def rows(self) -> row_blocks.Hadamard:
        return row_blocks.Hadamard(*self._factors(wide=True))

    def overlap(self, weight: Tensor, axis: dora.Axis) -> dora.Overlap:
        square, (out, fan_in) = self.rank * self.rank, (self.shape.out, self.shape.fan_in)
        if square * (out + fan_in) >= out * fan_in:
            return super().overlap(weight, axis)
        return dora.overlap_of_product(*khatri_rao(*self._factors(wide=True)), weight, axis)

    @property
    def dtype(self) -> torch.dtype:
        return self.hada_w1_b.dtype

    def _dropped(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """The delta with ranks dropped independently in both products, so that a pair (p, q) stays where both do."""
        shape, rank = self.shape, self.rank
        up, down = cast(x.dtype, *khatri_rao(*factors))
        hidden = shape.apply(x, down.view(rank * rank, shape.inner, *shape.kernel)) * self.scale
        pairs = self.kept(x, rank).unsqueeze(-1) * self.kept(x, rank).unsqueeze(-2)
        return shape.mix(hidden * shape.along_channels(pairs.flatten(-2), hidden), up)

    def _factors(self, wide: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a1 (out, r), b1 (r, fan-in), a2, b2, whether or not there are cores; `wide` in float32 or better."""
        own: Any = self._parameters  # past Module.__getattr__, which is slow
        wide = wide or own["hada_w1_a"].itemsize == 1  # torch multiplies no float8
        stored = (own["hada_w1_a"], own["hada_w1_b"], own["hada_w2_a"], own["hada_w2_b"])
        a1, b1, a2, b2 = map(self.wide, stored) if wide else stored
        if self.hada_t1 is None or self.hada_t2 is None:
            return a1, b1, a2, b2
        t1, t2 = (self.wide(self.hada_t1), self.wide(self.hada_t2)) if wide else (self.hada_t1, self.hada_t2)
        return a1.T, fold_core(t1, b1), a2.T, fold_core(t2, b2)


create_network, create_network_from_weights = factory(LoHa)
