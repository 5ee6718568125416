"""LoKr: dW = alpha/r * kron(w1, w2) (LyCORIS, Yeh et al. 2024, https://arxiv.org/abs/2309.14859, section 4; KronA, https://arxiv.org/abs/2212.10650).

The weight's rows are A*C and its columns B*D; w1 is (A, B), w2 is (C, D, *kernel), or w2_a (C, r) @ w2_b (r, D * kernel), or for
convolutions a Tucker core t2 (r, r, *kernel) between w2_a (r, C) and w2_b (r, D). w1 may be w1_a (A, r) @ w1_b (r, B).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.core.options import option
from library.models.naming import Target
from networks import dora, row_blocks
from networks.arguments import WHERE, NetworkArguments
from networks.base import Adapter
from networks.extras import Extras
from networks.factory import factory
from networks.kernels.cost import FUSED, MATERIALISE, KroneckerWays
from networks.kernels.kronecker import kronecker_product
from networks.kernels.materialised import Kronecker, materialised
from networks.kernels.products import Base, cast
from networks.layers import LayerShape, fold_core


@dataclass(kw_only=True, frozen=True)
class LoKrArguments(NetworkArguments):
    """Network arguments of LoKr."""

    factor: int = option(-1, help="split of every side of a weight: its smaller factor is at most this; -1 splits as evenly as possible")
    network_reg_factors: dict | str | None = option(None, help="factors by regex: regex=8,regex2=-1; the first match counts")
    decompose_both: bool = option(False, help="give the first factor a rank too, where that is smaller than storing it whole")
    full_matrix: bool = option(False, help="store both factors whole, whatever the rank; the scale is 1 then")
    unbalanced_factorization: bool = option(False, help="give the larger side of the outputs to the first factor")

    tables: ClassVar[tuple[str, ...]] = (*NetworkArguments.tables, "network_reg_factors")

    def check(self) -> Iterable[str]:
        yield from super().check()
        if not is_factor(self.factor):
            yield f"{WHERE} factor={self.factor}: must be -1 (as even as possible) or at least 1"
        for entry in self.patterns("network_reg_factors").entries:
            if not is_factor(entry.value):
                yield f"{entry.where}: a factor must be -1 (as even as possible) or at least 1"
        if self.full_matrix and self.decompose_both:
            yield f"{WHERE} decompose_both: contradicts full_matrix, which stores both factors whole"
        if self.full_matrix and self.use_tucker:
            yield f"{WHERE} use_tucker: contradicts full_matrix, which stores both factors whole"

    def at(self, target: Target) -> "LoKrArguments":
        """The arguments for one layer, with its own factor."""
        entry = self.patterns("network_reg_factors").first(target.path, target.module_path)
        return self if entry is None else replace(self, factor=int(entry.value), network_reg_factors=None)


def is_factor(value: float) -> bool:
    """Whether a number can be a factor: -1, or a whole number of at least 1."""
    return value == int(value) and (value == -1 or value >= 1)


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a LoKr divides a weight: w1 is (a, b), w2 (c, d); each product has a rank, or None where it is stored whole."""

    a: int
    b: int
    c: int
    d: int
    rank1: int | None = None
    rank2: int | None = None
    has_core: bool = False  # whether w2 is a Tucker decomposition

    @classmethod
    def asked(cls, shape: LayerShape, rank: int, arguments: LoKrArguments) -> "Split":
        """The split of LyCORIS and sd-scripts: a factor has a rank where that is below half its larger side."""
        a, c = factorise(shape.out, arguments.factor)
        b, d = factorise(shape.inner, arguments.factor)
        if arguments.unbalanced_factorization:
            a, c = c, a
        rank1 = rank if arguments.decompose_both and rank < max(a, b) / 2 else None
        rank2 = rank if not arguments.full_matrix and rank < max(c, d) / 2 else None
        return cls(a=a, b=b, c=c, d=d, rank1=rank1, rank2=rank2, has_core=bool(arguments.use_tucker and rank2 and not shape.is_pointwise))


def factorise(size: int, factor: int) -> tuple[int, int]:
    """`size` as m * n with m <= n: by `factor` where it divides, else by the largest divisor up to it and to the root of size."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = min(math.isqrt(size), factor if factor > 0 else size)
    m = next(m for m in range(limit, 0, -1) if size % m == 0)
    return m, size // m


class LoKr(Adapter):
    """The Kronecker product of a small matrix and a larger one, the larger one whole or of rank `rank`."""

    title = "LoKr"
    signature = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    boosted = ("lokr_w1",)
    folds_into = ("lokr_w1", "lokr_w1_a")
    Arguments: ClassVar[type] = LoKrArguments

    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter | None
    lokr_w1_b: nn.Parameter | None
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter | None
    lokr_w2_b: nn.Parameter | None
    lokr_t2: nn.Parameter | None

    def __init__(self, name: str, layer: nn.Module, *, split: Split, rank: int, alpha: float, extras: Extras | None = None) -> None:
        self.has_rank = split.rank1 is not None or split.rank2 is not None
        self.split = split
        super().__init__(name, layer, rank=rank, alpha=alpha, extras=extras)
        kernel, c, d = self.shape.kernel, split.c, split.d
        self._hold("lokr_w1", split.rank1, whole=(split.a, split.b), left=(split.a, split.rank1), right=(split.rank1, split.b))
        left, right = (split.rank2, c), (split.rank2, d)
        if not split.has_core:
            left, right = (c, split.rank2), (split.rank2, d * math.prod(kernel))
        self._hold("lokr_w2", split.rank2, whole=(c, d, *kernel), left=left, right=right)
        core = (split.rank2, split.rank2, *kernel)
        self.lokr_t2 = nn.Parameter(torch.empty(*core)) if split.has_core else None  # pyright: ignore[reportArgumentType]

    @classmethod
    def designed(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: LoKrArguments) -> "LoKr":
        split = Split.asked(LayerShape.of(layer), rank, arguments)
        return cls(name, layer, split=split, rank=rank, alpha=alpha, extras=Extras.asked(arguments))

    @classmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "LoKr":
        shape = LayerShape.of(layer)
        split = read_split(name, shape, tensors)
        rank = split.rank2 or split.rank1 or written_rank(tensors.get("alpha"), otherwise=max(split.c, split.d))
        adapter = cls(name, layer, split=split, rank=rank, alpha=0, extras=Extras.found(name, shape, tensors))
        adapter.load(tensors)
        return adapter

    @classmethod
    def remarks(cls, adapters: Sequence[Adapter]) -> list[str]:
        full = [adapter for adapter in adapters if isinstance(adapter, LoKr) and adapter.alpha_is_void]
        if not full:
            return []
        return [
            f"LoKr: {len(full)} of {len(adapters)} layers store a whole second factor, because full_matrix is given or the rank is at "
            "least half its larger side; their scale is 1 whatever network_alpha is. A smaller network_dim or factor gives them a rank"
        ]

    def initialise(self) -> None:
        for parameter in (self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, self.lokr_w2_a):
            if parameter is not None:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        last = given(self.lokr_w2 if self.lokr_w2 is not None else self.lokr_w2_b)
        self.begin(last, lambda parameter: nn.init.kaiming_uniform_(parameter, a=math.sqrt(5)))
        if self.lokr_t2 is not None:
            nn.init.kaiming_uniform_(self.lokr_t2, a=math.sqrt(5))

    def formula(self) -> Tensor:
        return kronecker(*self.whole_factors())

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """w1 (A, B) and w2 (C, D, kernel positions), in float32 or better, however they are stored."""
        w1 = self.wide(self.lokr_w1) if self.lokr_w1 is not None else self.wide(given(self.lokr_w1_a)) @ self.wide(given(self.lokr_w1_b))
        if self.lokr_w2 is not None:
            w2 = self.wide(self.lokr_w2)
        else:
            left, right = self.wide(given(self.lokr_w2_a)), self.wide(given(self.lokr_w2_b))
            w2 = left @ right if self.lokr_t2 is None else left.T @ fold_core(self.wide(self.lokr_t2), right)
        return w1, w2.reshape(self.split.c, self.split.d, -1)

    def delta(self, x: Tensor, base: Base | None = None) -> Tensor:
        """By w1 and w2 in turn, in the cheapest order: an (out, in) tensor is made where w1's rows do not divide into the layer's groups,
        or where it is asked for.
        """
        shape, w1 = self.shape, self._w1()
        if self.drops_ranks:
            return self.onto(base, x, self._delta_conv(x, w1) if shape.kernel else self._delta_linear(x, w1))
        way = self.way(x, base)
        if way.startswith(MATERIALISE):
            return materialised(x, (w1, self.whole_factors()[1]), Kronecker(), self.scale, shape, base)
        own = self._parameters  # past Module.__getattr__, which is slow
        if self.split.rank2 is None:
            w2 = (given(own["lokr_w2"]),)
        elif self.lokr_t2 is None:
            w2 = (given(own["lokr_w2_a"]), given(own["lokr_w2_b"]))
        else:
            w2 = (given(self.lokr_w2_a).T, given(self.lokr_w2_b), self.lokr_t2)
        return kronecker_product(x, w1, w2, self.scale, shape, base, mixes_first=way.startswith("w1_first"), is_fused=way.endswith(FUSED))

    @property
    def ways(self) -> KroneckerWays:
        split = self.split
        return KroneckerWays((split.a, split.b, split.c, split.d * math.prod(self.shape.kernel)), split.rank2)

    @property
    def has_ranks(self) -> bool:
        return self.shape.groups == 1 and self.split.rank2 is not None

    def overlap(self, weight: Tensor, axis: dora.Axis) -> dora.Overlap:
        return dora.overlap_of_kronecker(*self.whole_factors(), weight, axis)

    def rows(self) -> row_blocks.Kronecker:
        w1, w2 = self.whole_factors()
        return row_blocks.Kronecker(w1.detach(), w2.detach().flatten(1))

    @property
    def has_factored_ways(self) -> bool:
        return self.split.a % self.shape.groups == 0

    @property
    def dtype(self) -> torch.dtype:
        return given(self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_a).dtype

    def set_alpha(self, alpha: float) -> None:
        """Set alpha; it is without effect, and kept as the rank, where both factors are whole: there is no rank to divide by."""
        self.alpha_is_void = not self.has_rank and alpha not in (0, self.rank)
        super().set_alpha(alpha if self.has_rank else self.rank)

    def stored_alpha(self, alpha: Tensor | None) -> float:
        return super().stored_alpha(alpha) if self.has_rank else float(self.rank)

    # Through w2's ranks step by step, where some are dropped

    def _delta_linear(self, x: Tensor, w1: Tensor) -> Tensor:
        """`x` (..., B * D) to (..., A * C)."""
        mixer, left, right = cast(x.dtype, w1 * self.scale, given(self.lokr_w2_a), given(self.lokr_w2_b))
        hidden = torch.matmul(mixer, F.linear(x.unflatten(-1, (self.split.b, self.split.d)), right))  # (..., A, r)
        return F.linear(self._drop_block_ranks(hidden, x), left).flatten(-2)

    def _delta_conv(self, x: Tensor, w1: Tensor) -> Tensor:
        """`x` (N, B * D, *positions) to (N, A * C, *positions): w2's ranks slide over N * B images, w1 mixes their results."""
        split, shape = self.split, self.shape
        if not shape.batch_of(x):
            return self._delta_conv(x.unsqueeze(0), w1).squeeze(0)
        hidden = self._slide(x.reshape(-1, split.d, *x.shape[2:]))  # (N * B, r, *positions)
        inner, positions = hidden.shape[1], hidden.shape[2:]
        mixer, left = cast(x.dtype, w1 * self.scale, given(self.lokr_w2_a))
        hidden = torch.matmul(mixer, hidden.reshape(x.shape[0], split.b, inner * positions.numel()))  # (N, A, r * positions)
        hidden = self._drop_block_ranks(hidden.reshape(x.shape[0], split.a, inner, *positions), x).reshape(-1, inner, *positions)
        return shape.mix(hidden, left if self.lokr_t2 is None else left.T).reshape(x.shape[0], split.a * split.c, *positions)

    def _slide(self, images: Tensor) -> Tensor:
        """`images` (N * B, D, *positions) through the kernel to w2's ranks."""
        right = given(self.lokr_w2_b).to(images.dtype)
        if self.lokr_t2 is not None:
            return self.shape.apply(self.shape.mix(images, right), self.lokr_t2.to(images.dtype))
        return self.shape.apply(images, right.reshape(-1, self.split.d, *self.shape.kernel))

    def _drop_block_ranks(self, hidden: Tensor, x: Tensor) -> Tensor:
        """Rank dropout on `hidden` (batch, ..., A, r, *positions): the rank axis stands where channels do."""
        return hidden * self.shape.along_channels(self.kept(x, self.rank), hidden) if self.drops_ranks else hidden

    def _w1(self) -> Tensor:
        """w1 (A, B) with the learned scalar, where there is one."""
        w1 = self._parameters["lokr_w1"]
        if w1 is not None:
            return self.scaled(multipliable(w1))
        with torch.autocast(self.alpha.device.type, enabled=False):  # a product of parameters: small, and rounded once with the result
            return self.scaled(multipliable(given(self.lokr_w1_a)) @ multipliable(given(self.lokr_w1_b)))

    def _hold(self, name: str, rank: int | None, *, whole: tuple[int, ...], left: tuple, right: tuple) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(whole)) if rank is None else None)
        self.register_parameter(f"{name}_a", None if rank is None else nn.Parameter(torch.empty(left)))
        self.register_parameter(f"{name}_b", None if rank is None else nn.Parameter(torch.empty(right)))


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """kron(w1, w2) over rows and inner channels, at every position of the kernel: (A, B) and (C, D, K) to (A, C, B, D, K)."""
    return torch.einsum("ab,cdk->acbdk", w1, w2)


def given(parameter: Tensor | None) -> Tensor:
    """A parameter that the split promises to be there."""
    assert parameter is not None
    return parameter


def multipliable(parameter: Tensor) -> Tensor:
    """A parameter in a dtype that torch multiplies, which float8 is not."""
    return parameter.float() if parameter.itemsize == 1 else parameter


def written_rank(alpha: Tensor | None, otherwise: int) -> int:
    """The rank of a file whose factors are both whole: the alpha written for it, unless that is no count (ai-toolkit's 1e10, inf)."""
    value = float(alpha) if alpha is not None and alpha.numel() == 1 else 0.0
    return int(value) if 1 <= value <= 1_000_000 and value == int(value) else otherwise


def read_split(name: str, shape: LayerShape, tensors: Mapping[str, Tensor]) -> Split:
    """The split that a file's tensors have: never derived from arguments. Raises `ValueError` where they do not fit the layer."""
    has_core = "lokr_t2" in tensors and "lokr_w2" not in tensors
    a, b, rank1 = _sides(name, "lokr_w1", tensors)
    c, _, rank2 = _sides(name, "lokr_w2", tensors, is_transposed=has_core)
    if a * c != shape.out or shape.inner % b:
        raise ValueError(f"{name}: w1 ({a}, {b}) and w2 with {c} rows do not make a weight of shape {list(shape.weight)}")
    return Split(a=a, b=b, c=c, d=shape.inner // b, rank1=rank1, rank2=rank2, has_core=has_core)


def _sides(name: str, factor: str, tensors: Mapping[str, Tensor], is_transposed: bool = False) -> tuple[int, int, int | None]:
    """Rows, columns and rank of a factor; rank None where it is stored whole. With a core the left part is stored as (rank, rows)."""
    if factor in tensors:
        return (*_matrix(name, factor, tensors[factor]), None)
    lacking = [part for part in (f"{factor}_a", f"{factor}_b") if part not in tensors]
    if lacking:
        raise ValueError(f"{name}: the file lacks {factor}, or {' and '.join(lacking)}")
    rows, rank = _matrix(name, f"{factor}_a", tensors[f"{factor}_a"])
    if is_transposed:
        rows, rank = rank, rows
    return rows, _matrix(name, f"{factor}_b", tensors[f"{factor}_b"])[1], rank


def _matrix(name: str, parameter: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() < 2 or 0 in tensor.shape:
        raise ValueError(f"{name}.{parameter} has the shape {list(tensor.shape)}; a matrix was expected")
    return tensor.shape[0], tensor.shape[1]


create_network, create_network_from_weights = factory(LoKr)
