"""Which way to a delta is cheapest: a model of its time from products, passes over memory and kernels, for what a device can do.

A way's time is that of its products and passes in one forward and backward, beyond what the frozen layer costs anyway:
max(FLOPs / speed, bytes / bandwidth) for each, and a constant a kernel. Small sides make products slower: `speed` is scaled by
side / (side + `slow_side`). The CPU's figures come from timed products, and `python -m benchmarks.paths` checks what they choose;
those of CUDA devices are the published ones of a data-centre card, whose ratios other cards share, and nothing has checked them yet:
`autotune=True` measures instead (`autotune.py`).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

Path = Literal["auto", "factored", "materialise"]
MATERIALISE = "materialise"
FUSED = " fused"  # ends the name of a way that runs on Triton kernels: never chosen by this model, only by measurement

TOKENS = tuple(1 << power for power in range(21))  # where ways are compared: 1 to a million rows


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device can do."""

    flops: float  # operations a second in large products
    bandwidth: float  # bytes a second
    launch: float  # seconds a kernel
    slow_side: float  # the side of a product at which it runs at half speed

    def product(self, m: int, n: int, k: int, width: int = 4) -> float:
        """Seconds of an (m, k) by (k, n) product with elements of `width` bytes."""
        side = min(m, n, k)
        traffic = (m * k + k * n + m * n) * width
        return max(2 * m * n * k / self.flops * (side + self.slow_side) / side, traffic / self.bandwidth) + self.launch

    def passes(self, elements: int, count: float = 1, width: int = 4) -> float:
        """Seconds of `count` elementwise kernels that read and write about three tensors of that size."""
        return count * (3 * elements * width / self.bandwidth + self.launch)


CPU = Speed(flops=93e9, bandwidth=12e9, launch=5e-6, slow_side=10)  # a thread; threads change all figures alike
CUDA = {
    2: Speed(flops=790e12, bandwidth=3.0e12, launch=2e-6, slow_side=32),
    4: Speed(flops=60e12, bandwidth=3.0e12, launch=2e-6, slow_side=32),
}


def speed_of(device_type: str, dtype: torch.dtype) -> Speed:
    """The figures for a kind of device and the dtype in which it computes."""
    return CPU if device_type == "cpu" else CUDA[2 if dtype.itemsize <= 2 else 4]


@dataclass(frozen=True)
class Setting:
    """Where a delta is applied: `width` bytes an element, and whether the base's product is at hand to be joined with."""

    speed: Speed
    width: int
    joins: bool

    @classmethod
    def of(cls, device_type: str, dtype: torch.dtype, joins: bool) -> "Setting":
        """The setting of products in `dtype` on a device."""
        return cls(speed_of(device_type, dtype), dtype.itemsize, joins)

    def low_rank(self, tokens: int, out: int, fan_in: int, rank: int, *, is_kept: bool = True) -> float:
        """As a LoRA of this rank; hidden values that are not kept are computed twice."""
        product = self.speed.product
        down, up = product(tokens, rank, fan_in, self.width), product(tokens, out, rank, self.width)
        return down * (3 if is_kept else 4) + up * 3

    def khatri_rao(self, tokens: int, out: int, fan_in: int, rank: int) -> float:
        """LoHa as a LoRA of rank r*r, whose factors are made twice and whose gradients are taken apart."""
        square = rank * rank
        factors = self.speed.passes(square * (out + fan_in), 5)
        return self.low_rank(tokens, out, fan_in, square, is_kept=10 * square <= fan_in) + factors

    def dense(self, tokens: int, out: int, fan_in: int) -> float:
        """What every materialised delta costs: its gradient, and its own products where the base's cannot serve for both."""
        product = self.speed.product(tokens, out, fan_in, self.width)
        forward = 0 if self.joins and self.width >= 4 else 1
        return product * (1 + forward + (0 if self.joins else 1))

    def hadamard(self, tokens: int, out: int, fan_in: int, rank: int) -> float:
        """LoHa by its weight, made twice."""
        build = 2 * self.speed.product(out, fan_in, rank, self.width) + self.speed.passes(out * fan_in, width=self.width)
        gradients = 4 * self.speed.product(out, rank, fan_in, self.width) + self.speed.passes(out * fan_in, 2, self.width)
        return self.dense(tokens, out, fan_in) + 2 * build + gradients

    def outer(self, tokens: int, out: int, fan_in: int, rank: int) -> float:
        """LoRA by its weight, made twice."""
        build = self.speed.product(out, fan_in, rank, self.width) + self.speed.passes(out * fan_in, width=self.width)
        return self.dense(tokens, out, fan_in) + 2 * build + 2 * self.speed.product(out, rank, fan_in, self.width)

    def kron(self, tokens: int, out: int, fan_in: int) -> float:
        """LoKr by its weight, made twice."""
        return self.dense(tokens, out, fan_in) + self.speed.passes(out * fan_in, 4, self.width)

    def rank_space(self, tokens: int, sides: tuple[int, int, int, int], rank: int) -> float:
        """LoKr through w2's rank; `sides` are A, B, C, D with the kernel's positions in D."""
        a, b, c, d = sides
        large = 3 * self.speed.product(tokens * b, rank, d, self.width) + 3 * self.speed.product(tokens * a, c, rank, self.width)
        return large + 4 * self._mix(tokens, a, b, rank)

    def w2_first(self, tokens: int, sides: tuple[int, int, int, int]) -> float:
        """LoKr with w2 whole, applied before w1."""
        a, b, c, d = sides
        return self.speed.product(tokens * b, c, d, self.width) + self._mix(tokens, a, b, c) + self._kronecker_backward(tokens, sides)

    def w1_first(self, tokens: int, sides: tuple[int, int, int, int]) -> float:
        """LoKr with w2 whole, applied after w1."""
        a, b, c, d = sides
        return self._mix(tokens, a, b, d) + self.speed.product(tokens * a, c, d, self.width) + self._kronecker_backward(tokens, sides)

    def _kronecker_backward(self, tokens: int, sides: tuple[int, int, int, int]) -> float:
        a, b, c, d = sides
        large = 2 * self.speed.product(tokens * a, d, c, self.width)
        return large + 2 * self._mix(tokens, a, b, d) + self._mix(tokens, a, b, min(d, c))

    def _mix(self, tokens: int, a: int, b: int, size: int) -> float:
        """Blocks (tokens, B, size) mixed by (A, B): many small products."""
        return self.speed.product(a, tokens * size, b, self.width)


class Ways(Protocol):
    """A frozen description of an adapter on a layer, which knows what each of its ways costs."""

    with_kernels: ClassVar[tuple[str, ...]]  # the ways that have Triton kernels, for Linear layers

    def costs(self, tokens: int, setting: Setting) -> dict[str, float]:
        """Seconds of each way, by name; the one that makes dW is called `materialise`."""
        ...


Ranges = tuple[tuple[int, str], ...]
"""Pairs of a number of tokens and the way up to it, ascending; the last pair's way has no bound."""


def way_at(ranges: Ranges, tokens: int) -> str:
    """The way for some tokens."""
    for bound, way in ranges[:-1]:
        if tokens <= bound:
            return way
    return ranges[-1][1]


def allowed(ways: list[str], path: Path) -> list[str]:
    """Those of some ways that `path` allows."""
    return [way for way in ways if path == "auto" or (way == MATERIALISE) == (path == MATERIALISE)]


@functools.cache
def cheapest(ways: Ways, setting: Setting, path: Path) -> Ranges:
    """The cheapest way for every number of tokens, of those that `path` allows."""

    def costs(tokens: int) -> dict[str, float]:
        found = ways.costs(tokens, setting)
        return {way: found[way] for way in allowed(list(found), path)}

    return tuple(_ranges(costs))


def _ranges(costs: Callable[[int], dict[str, float]]) -> Iterator[tuple[int, str]]:
    """Each way with the number of tokens up to which it is the cheapest, in between two powers of two by halving."""
    best = [min(found := costs(tokens), key=found.__getitem__) for tokens in TOKENS]
    for index, way in enumerate(best[:-1]):
        if best[index + 1] != way:
            yield _last(costs, way, TOKENS[index], TOKENS[index + 1]), way
    yield TOKENS[-1], best[-1]


def _last(costs: Callable[[int], dict[str, float]], way: str, low: int, high: int) -> int:
    """The largest number of tokens from `low` to `high` at which `way` is still the cheapest."""
    while high - low > 1:
        middle = (low + high) // 2
        found = costs(middle)
        low, high = (middle, high) if found[way] <= min(found.values()) else (low, middle)
    return low


@dataclass(frozen=True)
class LowRankWays:
    """LoRA on a weight of (out, fan-in)."""

    with_kernels: ClassVar[tuple[str, ...]] = ("factored",)

    out: int
    fan_in: int
    rank: int

    def costs(self, tokens: int, setting: Setting) -> dict[str, float]:
        return {
            "factored": setting.low_rank(tokens, self.out, self.fan_in, self.rank),
            MATERIALISE: setting.outer(tokens, self.out, self.fan_in, self.rank),
        }


@dataclass(frozen=True)
class HadamardWays:
    """LoHa on a weight of (out, fan-in)."""

    with_kernels: ClassVar[tuple[str, ...]] = ("khatri_rao", MATERIALISE)

    out: int
    fan_in: int
    rank: int

    def costs(self, tokens: int, setting: Setting) -> dict[str, float]:
        return {
            "khatri_rao": setting.khatri_rao(tokens, self.out, self.fan_in, self.rank),
            MATERIALISE: setting.hadamard(tokens, self.out, self.fan_in, self.rank),
        }


@dataclass(frozen=True)
class KroneckerWays:
    """LoKr of w1 (A, B) and w2 (C, D), the kernel's positions in D; `rank` of w2, or None where it is whole."""

    with_kernels: ClassVar[tuple[str, ...]] = ("rank_space", "w2_first", "w1_first")

    sides: tuple[int, int, int, int]
    rank: int | None

    def costs(self, tokens: int, setting: Setting) -> dict[str, float]:
        a, b, c, d = self.sides
        dense = {MATERIALISE: setting.kron(tokens, a * c, b * d)}
        if self.rank is not None:
            return {"rank_space": setting.rank_space(tokens, self.sides, self.rank), **dense}
        return {"w2_first": setting.w2_first(tokens, self.sides), "w1_first": setting.w1_first(tokens, self.sides), **dense}
