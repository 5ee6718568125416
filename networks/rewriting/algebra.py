"""Algebra of adapters: exact ways from one factorisation of a change of weight to another, and the best products of a lower rank.

Pure functions of float32 or float64 tensors, computed in that dtype. A weight is (o, i, *k): o rows, i inner channels, any kernel k, none
for Linear. As a matrix its columns are i and k flattened, k innermost; where a function says "columns" it means those.
What is said to be exact is exact up to rounding of the dtype; tests hold the identities to 1e-10 in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from networks.kernels.low_rank import khatri_rao
from networks.layers import fold_core
from networks.lokr import kronecker

EXACT_SIDE = 256  # up to this smaller side, a dense matrix is decomposed exactly
OVERSAMPLING, POWER_STEPS = 10, 3  # of the randomised decomposition; see `dense_spectrum`
SEED = 20111  # of its random start: the same weight has the same decomposition in every run


class LowRank(NamedTuple):
    """A weight as the product up @ down."""

    up: Tensor  # (o, r)
    down: Tensor  # (r, i, *k)

    @property
    def rank(self) -> int:
        """The width of the product, r."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """The weight (o, i, *k)."""
        return (self.up @ self.down.flatten(1)).reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Spectrum:
    """The leading part of a singular value decomposition of a weight: u @ diag(values) @ v."""

    u: Tensor  # (o, p), orthonormal columns
    values: Tensor  # (p,), falling
    v: Tensor  # (p, i, *k), orthonormal rows
    rest: float = 0.0  # the squared norm of all that is not in it

    def low_rank(self, rank: int) -> LowRank:
        """The best product of `rank`; every singular value is shared between both factors, which keeps half precision in range."""
        root = self.values[:rank].sqrt()
        return LowRank(self.u[:, :rank] * root, self.v[:rank] * root.reshape(-1, *(1 for _ in self.v.shape[1:])))

    def error(self, rank: int) -> float:
        """The error of `low_rank(rank)`, relative to the norm of the whole weight."""
        squares = self.values.double().square()
        lost, total = float(squares[rank:].sum()) + self.rest, float(squares.sum()) + self.rest
        return (lost / total) ** 0.5 if total else 0.0


# Ranks and errors


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of `exact`, summed in float64; without any norm, 0 where both are zero, else infinite."""
    difference = float(torch.linalg.vector_norm(approximation.detach() - exact.detach(), dtype=torch.float64))
    norm = float(torch.linalg.vector_norm(exact.detach(), dtype=torch.float64))
    return difference / norm if norm else float("inf") if difference else 0.0


def check_wish(rank: int | None, max_error: float | None) -> None:
    """Raise `ValueError` where a wished rank is less than 1 or a wished error not in [0, 1)."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}: must be at least 1")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"max_error {max_error:g}: must be at least 0 and less than 1; it is relative to the norm of the change")


def rank_for(values: Tensor, rank: int | None = None, max_error: float | None = None, rest: float = 0.0) -> int:
    """How many of the falling singular `values` to keep: as few as have a relative error of `max_error`, never more than `rank`.

    Without either, all of them. At least 1: there is no adapter of rank 0. `rest` is squared norm that no rank keeps (`Spectrum.rest`):
    where it alone is above the wished error, all are kept. Eckart, Young 1936: no other product of that rank has a smaller error.
    Raises `ValueError` as `check_wish`.
    """
    check_wish(rank, max_error)
    most = values.numel() if rank is None else min(rank, values.numel())
    if max_error is None:
        return max(1, most)
    squares = values.double().square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + rest  # lost by keeping 0, 1, ..., all
    enough = (tails <= max_error**2 * tails[0]).nonzero()
    return max(1, min(most, int(enough[0]) if enough.numel() else most))


# Singular values without forming the weight


def product_spectrum(product: LowRank) -> Spectrum:
    """The decomposition of up @ down, without forming it unless it is no wider than the product.

    By two QR and one small decomposition: with up = Q R, down^T = P S and R S^T = U s V it is Q U, s, V P^T.
    """
    if product.rank >= smaller_side(product):
        return dense_spectrum(product.dense())
    q_up, r_up = torch.linalg.qr(product.up)
    q_down, r_down = torch.linalg.qr(product.down.flatten(1).mT)
    u, values, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return Spectrum(q_up @ u, values, (v @ q_down.mT).reshape(-1, *product.down.shape[1:]))


def kron_spectrum(first: Spectrum, second: Spectrum, rank: int | None = None, max_error: float | None = None) -> Spectrum:
    """The decomposition of w1 (x) w2 from those of w1 (no kernel) and w2: singular values multiply, vectors are Kronecker products.

    Only as many as `rank_for(..., rank, max_error)` are built. Horn, Johnson, Topics in Matrix Analysis, theorem 4.2.15.
    """
    values, order = torch.outer(first.values, second.values).flatten().sort(descending=True, stable=True)
    squares = values.double().square()
    whole = [float(part.values.double().square().sum()) + part.rest for part in (first, second)]
    rest = max(0.0, whole[0] * whole[1] - float(squares.sum())) if first.rest or second.rest else 0.0
    count = rank_for(values, rank, max_error, rest)
    p, q = order[:count] // second.values.numel(), order[:count] % second.values.numel()
    u = torch.einsum("an,cn->acn", first.u[:, p], second.u[:, q]).flatten(0, 1)
    v = torch.einsum("nb,nd->nbd", first.v[p], second.v[q].flatten(1)).reshape(count, -1, *second.v.shape[2:])
    return Spectrum(u, values[:count], v, rest + float(squares[count:].sum()))


def dense_spectrum(weight: Tensor, rank: int | None = None) -> Spectrum:
    """The decomposition of a weight (o, i, *k): all of it, or the first `rank` values where that is much cheaper.

    Exact while the smaller side is at most 256 or 4 * (rank + 10); else by a random start and three power steps (Halko, Martinsson, Tropp
    2011, algorithm 4.4, https://arxiv.org/abs/0909.4061). The products are then projections of the weight, so `error` is their true error;
    it is within 1 % of the smallest possible, for white noise too.
    """
    matrix = weight.flatten(1)
    sketch = min(matrix.shape) if rank is None else rank + OVERSAMPLING
    if min(matrix.shape) <= max(EXACT_SIDE, 4 * sketch):
        u, values, v = _decomposed(matrix)
        return Spectrum(u, values, v.reshape(-1, *weight.shape[1:]))
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], sketch, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(POWER_STEPS):
        basis, _ = torch.linalg.qr(matrix.mT @ basis)
        basis, _ = torch.linalg.qr(matrix @ basis)
    u, values, v = _decomposed(basis.mT @ matrix)
    found = float(values.double().square().sum())
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    return Spectrum(basis @ u, values, v.reshape(-1, *weight.shape[1:]), max(0.0, total - found))


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, values, v of a matrix; a long one is reduced to a square by QR first, which is several times faster than LAPACK's own way."""
    rows, columns = matrix.shape
    if rows > columns:
        v, values, u = _decomposed(matrix.mT)
        return u.mT, values, v.mT
    if columns < 2 * rows:
        return torch.linalg.svd(matrix, full_matrices=False)
    basis, triangle = torch.linalg.qr(matrix.mT)
    u, values, v = torch.linalg.svd(triangle.mT)
    return u, values, v @ basis.mT


def best_spectrum(weight: Tensor, rank: int | None = None, max_error: float | None = None) -> tuple[Spectrum, int]:
    """A decomposition of a dense weight that reaches far enough for `rank_for`, and the rank that it names.

    With `max_error`, decomposes 32 values, then four times as many, and so on: most changes of weights need few.
    """
    check_wish(rank, max_error)
    side = min(weight.flatten(1).shape)
    limit = side if rank is None else min(rank, side)
    count = limit if max_error is None else min(32, limit)
    while True:
        spectrum = dense_spectrum(weight, count if count < side else None)
        reach = spectrum.values.numel()
        if max_error is None or reach >= limit or spectrum.error(reach) <= max_error:
            return spectrum, rank_for(spectrum.values, limit, max_error, spectrum.rest)
        count = min(4 * count, limit)


# Exact identities


def flat_tucker(core: Tensor, a: Tensor, b: Tensor) -> LowRank:
    """A Tucker convolution T[p, q, *k] = sum core[x, y, *k] a[x, p] b[y, q] as a product of the rank of `a`: up = a^T, down = core * b.

    `core` (x, y, *k), `a` (x, o), `b` (y, i). For LoRA `a` is the transpose of lora_up.
    """
    return LowRank(a.mT, fold_core(core, b).reshape(core.shape[0], b.shape[1], *core.shape[2:]))


def exact_product(weight: Tensor) -> LowRank:
    """A weight as a product without loss: of its numerical rank where that is smaller than both sides, else with an identity."""
    matrix = weight.flatten(1)
    rows, columns = matrix.shape
    spectrum = dense_spectrum(weight)
    rank = rank_for(spectrum.values, max_error=8 * torch.finfo(weight.dtype).eps)
    if rank < min(rows, columns):
        return spectrum.low_rank(rank)
    if rows <= columns:
        return LowRank(torch.eye(rows, dtype=weight.dtype, device=weight.device), weight)
    return LowRank(matrix, torch.eye(columns, dtype=weight.dtype, device=weight.device).reshape(columns, *weight.shape[1:]))


def smaller_side(product: LowRank) -> int:
    """The smaller of the rows and columns of the weight: the rank that any weight of that shape can be written at."""
    return min(product.up.shape[0], product.down.flatten(1).shape[1])


def narrowed(product: LowRank) -> LowRank:
    """The same weight, written by a product that is no wider than the weight's smaller side."""
    return product if product.rank < smaller_side(product) else exact_product(product.dense())


def hadamard_product(first: LowRank, second: LowRank) -> LowRank:
    """(A1 B1) * (A2 B2), elementwise, as a product of rank r1 * r2: LoHa as LoRA. Exact."""
    return LowRank(*khatri_rao(first.up, first.down, second.up, second.down))


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """The Kronecker product over rows and inner channels: w1 (A, B), w2 (C, D, *k) to (A * C, B * D, *k); the kernel is carried."""
    product = kronecker(w1, w2.reshape(*w2.shape[:2], -1))
    return product.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])


def kron_product(w1: Tensor | LowRank, w2: Tensor | LowRank) -> LowRank:
    """w1 (x) w2 as a product, each of them a weight or a product itself: LoKr as LoRA.

    Its rank is that of w1 times that of w2: min(A, B) * r for a whole w1 of full rank. By (P Q) (x) (R S) = (P (x) R) (Q (x) S). Exact.
    """
    first, second = (narrowed(part) if isinstance(part, LowRank) else exact_product(part) for part in (w1, w2))
    return LowRank(kron(first.up, second.up), kron(first.down, second.down))


def as_kron(product: LowRank) -> tuple[Tensor, LowRank]:
    """A product as w1 (x) w2 with w1 = [[1]]: LoRA as LoKr of the same rank. Exact."""
    return product.up.new_ones(1, 1), product


def as_hadamard(product: LowRank) -> tuple[LowRank, LowRank]:
    """A product as the elementwise product of itself and a weight of ones, written at the same rank: LoRA as LoHa. Exact."""
    ones = LowRank(torch.zeros_like(product.up), torch.zeros_like(product.down))
    ones.up[:, 0] = 1
    ones.down[0] = 1
    return product, ones


def concatenated(products: Sequence[LowRank], strengths: Sequence[float]) -> LowRank:
    """The sum of products, each times its strength, as one product of the sum of their ranks. Exact."""
    up = torch.cat([product.up * strength for product, strength in zip(products, strengths, strict=True)], dim=1)
    return LowRank(up, torch.cat([product.down for product in products]))
