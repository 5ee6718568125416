"""A delta taken a few rows at a time: for merging and for norms, which need every number of it once and never all of them together.

What is as large as the weight is written to memory and read again by every operation; a block of rows stays in the processor's cache.
Each kind of factors below equals its algorithm's `formula`, which tests hold; `Adapter.rows` gives an adapter's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from networks.base import Adapter

BLOCK = 1 << 18  # numbers in a block: a MiB of float32


class Rows(Protocol):
    """A matrix (out, inner * kernel) that can give single rows of itself, and tell its norm."""

    def block(self, rows: slice) -> Tensor:
        """A new tensor with these rows."""
        ...

    def norm(self) -> Tensor:
        """The Frobenius norm of the whole."""
        ...


@dataclass(frozen=True)
class Product:
    """up (out, r) @ down (r, inner * kernel)."""

    up: Tensor
    down: Tensor

    def block(self, rows: slice) -> Tensor:
        return self.up[rows] @ self.down

    def norm(self) -> Tensor:
        """|up down|^2 = <up^T up, down down^T>, by the cyclic trace."""
        return torch.sum((self.up.T @ self.up) * (self.down @ self.down.T)).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Hadamard:
    """(a1 @ b1) * (a2 @ b2), of a (out, r) and b (r, inner * kernel)."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    def block(self, rows: slice) -> Tensor:
        return (self.a1[rows] @ self.b1).mul_(self.a2[rows] @ self.b2)

    def norm(self) -> Tensor:
        """As the product of rank r*r that it is, where r is small; else block by block."""
        (out, rank), fan_in = self.a1.shape, self.b1.shape[1]
        if rank**3 * (out + fan_in) < 2 * out * fan_in:  # operations, over 2 r
            up = torch.einsum("op,oq->opq", self.a1, self.a2).flatten(1)
            return Product(up, torch.einsum("pf,qf->pqf", self.b1, self.b2).flatten(0, 1)).norm()
        blocks = blocks_of(out, fan_in, self.a1.device)
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(self.block(rows)) for rows in blocks]))


@dataclass(frozen=True)
class Kronecker:
    """kron(w1, w2) over rows and inner channels, of w1 (A, B) and w2 (C, D * kernel positions): row a * C + c is w1[a] times w2[c]."""

    w1: Tensor
    w2: Tensor

    def block(self, rows: slice) -> Tensor:
        """The turns of c that are whole all at once, and what there is of one before and after them."""
        (_, width), (count, depth) = self.w1.shape, self.w2.shape
        result = self.w1.new_empty(rows.stop - rows.start, width, depth)
        first = rows.start
        while first < rows.stop:
            a, c = divmod(first, count)
            turns = 1 if c else max(1, (rows.stop - first) // count)
            size = min(turns * count - c, rows.stop - first)
            goal = result[first - rows.start :][:size].view(turns, -1, width, depth)
            torch.mul(self.w1[a : a + turns, None, :, None], self.w2[None, c : c + size // turns, None, :], out=goal)
            first += size
        return result.flatten(1)

    def norm(self) -> Tensor:
        """|kron(w1, w2)| = |w1| |w2|."""
        return torch.linalg.vector_norm(self.w1) * torch.linalg.vector_norm(self.w2)


@torch.no_grad()
def delta_norm(adapter: "Adapter") -> Tensor:
    """The Frobenius norm of the scaled delta before DoRA, without forming it where the factors tell."""
    with torch.autocast(adapter.alpha.device.type, enabled=False):
        rows = adapter.rows()
        return torch.linalg.vector_norm(adapter.direction()) if rows is None else rows.norm() * abs(adapter.coefficient)


@torch.no_grad()
def write_sum(goal: Tensor, base: Tensor, adapters: Sequence["Adapter"]) -> None:
    """Write base + the sum of multiplier * delta to `goal`, which may be `base`: summed in float32 or better, rounded once."""
    if not adapters:
        goal.copy_(base)
        return
    dtype = torch.promote_types(base.dtype, torch.float32) if base.itemsize > 1 else torch.float32
    with torch.autocast(base.device.type, enabled=False):
        deltas = [_delta_by_rows(adapter, base, dtype) for adapter in adapters]
        for rows in blocks_of(len(base), math.prod(base.shape[1:]), base.device):
            total = base[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
            for block, strength in deltas:
                total.add_(block(rows).view_as(total), alpha=strength)
            goal[rows].copy_(total)


def blocks_of(out: int, fan_in: int, device: torch.device) -> Iterator[slice]:
    """The rows of an (out, fan_in) matrix in blocks that stay in the cache; all at once but on a CPU, for elsewhere launches cost more."""
    size = max(1, BLOCK // fan_in) if device.type == "cpu" else out
    return (slice(first, min(first + size, out)) for first in range(0, out, size))


def _delta_by_rows(adapter: "Adapter", base: Tensor, dtype: torch.dtype) -> tuple[Callable[[slice], Tensor], float]:
    """The rows of a delta on the device of `base`, and what to multiply them by in a sum of `dtype`.

    Rounded as multiplier * delta_weight() is. From the whole of it where DoRA, dtype or device want that.
    """
    is_alike = adapter.alpha.device == base.device and (dtype == torch.float32 or adapter.dtype == dtype)
    rows = adapter.rows() if adapter.dora_scale is None and is_alike else None
    if rows is None:
        delta = adapter.delta_weight(base).to(base.device, dtype)
        return delta.__getitem__, adapter.multiplier
    coefficient = adapter.coefficient
    if not isinstance(coefficient, Tensor) and math.frexp(coefficient)[0] == 0.5:  # a power of two rounds nothing: not worth a pass
        return rows.block, adapter.multiplier * coefficient
    return lambda place: rows.block(place).mul_(coefficient), adapter.multiplier
