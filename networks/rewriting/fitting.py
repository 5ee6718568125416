"""Fits of a dense change of weight by products that have no closed form: the nearest Kronecker and Hadamard products.

Pure functions of float32 or float64 tensors; weights are (o, i, *k) as in `networks.rewriting.algebra`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.rewriting.algebra import SEED, LowRank, check_wish, dense_spectrum, kron, rank_for, relative_error

SWEEPS = 30  # of an alternation, at most
SETTLED = 1e-4  # an alternation ends once a sweep lowers the error by less than this share of it


@dataclass(frozen=True, kw_only=True)
class KronFit:
    """w1 (x) w2 near a weight, both of the same mean square."""

    w1: Tensor  # (A, B)
    w2: Tensor | LowRank  # (C, D, *k), whole or of a rank
    errors: tuple[float, ...]  # relative, after each sweep: falling

    @property
    def error(self) -> float:
        """The relative error of the product."""
        return self.errors[-1]

    def dense(self) -> Tensor:
        """The product (A * C, B * D, *k)."""
        return kron(self.w1, self.w2.dense() if isinstance(self.w2, LowRank) else self.w2)


@dataclass(frozen=True, kw_only=True)
class HadamardFit:
    """The elementwise product of two products near a weight."""

    first: LowRank
    second: LowRank
    errors: tuple[float, ...]  # relative, after each sweep of the start that did best: falling

    @property
    def error(self) -> float:
        """The relative error of the product."""
        return self.errors[-1]

    def dense(self) -> Tensor:
        """The product (o, i, *k)."""
        return self.first.dense() * self.second.dense()


# Kronecker products


def rearranged(weight: Tensor, a: int, b: int) -> Tensor:
    """The weight (A * C, B * D, *k) as the matrix (A * B, C * D * k) in which w1 (x) w2 is the outer product of w1 and w2.

    Van Loan, Pitsianis 1993, Approximation with Kronecker products. Raises `ValueError` where `a` or `b` does not divide its side.
    """
    o, i = weight.shape[:2]
    if a < 1 or b < 1 or o % a or i % b:
        raise ValueError(f"a weight of shape {list(weight.shape)} is no Kronecker product with a first factor of {a} x {b}")
    return weight.reshape(a, o // a, b, i // b, -1).transpose(1, 2).reshape(a * b, -1)


def nearest_kron(
    weight: Tensor, a: int, b: int, *, rank: int | None = None, max_error: float | None = None, limit: float | None = None
) -> KronFit:
    """The Kronecker product nearest to a weight, with a w1 of (a, b) and a w2 that is whole, or of a rank where one is wished.

    Whole: the first singular pair of the rearranged weight; its error is sqrt(1 - s1^2 / sum s^2), and no other is nearer (for a w1 of more
    than 256 numbers as near as `dense_spectrum` promises).
    Of a rank: w2 (given w1, the truncated decomposition of the weight's mean over w1) and w1 (given w2, a mean over w2) in turn, each
    time optimal. `max_error` chooses that rank by the spectrum of the whole w2. It stays whole where it has no more parameters than one of
    the rank, and where even the whole w2 is further away than `max_error` or `limit`: then no rank is worth fitting.
    Raises `ValueError` as `rearranged` and `check_wish`.
    """
    check_wish(rank, max_error)
    matrix = rearranged(weight, a, b)
    shape = (weight.shape[0] // a, weight.shape[1] // b, *weight.shape[2:])
    spectrum = dense_spectrum(matrix, 1)
    w1 = spectrum.u[:, 0]
    w2 = matrix.mT @ w1
    whole = _kron_fit(w1.reshape(a, b), w2.reshape(shape), [relative_error(torch.outer(w1, w2), matrix)])
    if any(whole.error > bound for bound in (max_error, limit) if bound is not None):
        return whole
    if max_error is not None:
        missed = (whole.error * float(torch.linalg.vector_norm(matrix, dtype=torch.float64))) ** 2
        rank = rank_for(dense_spectrum(w2.reshape(shape)).values, rank, max_error, missed)
    columns = w2.numel() // shape[0]
    if rank is None or rank * (shape[0] + columns) >= shape[0] * columns:
        return whole
    return _alternate(matrix, w1, shape, rank, a)


def _alternate(matrix: Tensor, w1: Tensor, shape: tuple[int, ...], rank: int, a: int) -> KronFit:
    """Fit w2 of `rank` and w1 in turn, until settled; the last sweep that lowered the error counts."""
    errors: list[float] = []
    best = w1, LowRank(w1, w1)
    for _ in range(SWEEPS):
        w2 = dense_spectrum(_mean(matrix.mT, w1).reshape(shape), rank).low_rank(rank)
        flat = w2.dense().flatten()
        w1 = _mean(matrix, flat)
        error = relative_error(torch.outer(w1, flat), matrix)
        if errors and error >= errors[-1]:
            break
        errors.append(error)
        best = w1, w2
        if len(errors) > 1 and error > errors[-2] * (1 - SETTLED):
            break
    return _kron_fit(best[0].reshape(a, -1), best[1], errors)


def _mean(matrix: Tensor, weights: Tensor) -> Tensor:
    """The vector whose outer product with `weights` is nearest to `matrix`."""
    square = weights @ weights
    return matrix @ (weights / square) if square > 0 else matrix.new_zeros(matrix.shape[0])


def _kron_fit(w1: Tensor, w2: Tensor | LowRank, errors: list[float]) -> KronFit:
    """The fit with its size shared evenly, which keeps half precision in range."""
    whole = w2.dense() if isinstance(w2, LowRank) else w2
    sizes = [float(part.double().square().mean().sqrt()) for part in (w1, whole)]
    share = (sizes[1] / sizes[0]) ** 0.5 if all(sizes) else 1.0
    shared = LowRank(w2.up / share**0.5, w2.down / share**0.5) if isinstance(w2, LowRank) else w2 / share
    return KronFit(w1=w1 * share, w2=shared, errors=tuple(errors))


# Hadamard products


def nearest_hadamard(
    weight: Tensor, rank: int, *, near: tuple[LowRank, LowRank] | None = None, starts: int = 3, sweeps: int = SWEEPS
) -> HadamardFit:
    """A Hadamard product of two products of `rank` near a weight, by alternating least squares from several starts; the best is kept.

    The problem has many local minima, and the result is one of them. The first start is the best product of `rank` times a weight of ones,
    so the error is never above that product's. With the same number of parameters a plain product of rank 2 * `rank` is usually nearer,
    unless the weight was a Hadamard product of little more: then `near`, its truncated factors (of `rank` at most), are the best start.
    Computed in float64. Raises `ValueError` for a rank below 1.
    """
    check_wish(rank, None)
    matrix = weight.flatten(1).double()
    fits = [_descend(matrix, factors, sweeps) for factors in _starts(matrix, rank, starts, near)]
    (first, second), errors = min(fits, key=lambda fit: fit[1][-1])
    mean = (_mean_square(first.dense()) * _mean_square(second.dense())) ** 0.25  # of each product, once evened
    return HadamardFit(first=_evened(first, mean, weight), second=_evened(second, mean, weight), errors=tuple(errors))


def powers_of_two(most: int) -> list[int]:
    """The ranks that a search for an error tries, rising: 1, 2, 4, ..., and `most`."""
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def _starts(matrix: Tensor, rank: int, count: int, near: tuple[LowRank, LowRank] | None) -> Iterator[tuple[LowRank, LowRank]]:
    """Pairs of products to begin with: those given, the decomposition and a weight of nearly ones, then random ones."""
    generator = torch.Generator().manual_seed(SEED)

    def noise() -> LowRank:
        shapes = ((matrix.shape[0], rank), (rank, matrix.shape[1]))
        return LowRank(*(torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device) for shape in shapes))

    def widened(product: LowRank) -> LowRank:
        """At the full rank: one of few rows or columns has fewer."""
        wide = noise()
        wide.down.zero_()
        wide.up[:, : product.rank], wide.down[: product.rank] = product.up, product.down.flatten(1)
        return wide

    if near is not None:
        yield widened(near[0]), widened(near[1])
    ones = noise()
    ones.down.div_(10)[0] = 1
    yield widened(dense_spectrum(matrix, rank).low_rank(rank)), ones
    for _ in range(count - 1):
        yield noise(), noise()


def _descend(matrix: Tensor, start: tuple[LowRank, LowRank], sweeps: int) -> tuple[tuple[LowRank, LowRank], list[float]]:
    """Fit the four factors in turn, each optimally given the others, until settled."""
    first, second = start
    errors: list[float] = []
    best = start
    for _ in range(sweeps):
        second = _refit(matrix, second, first.dense())
        first = _refit(matrix, first, second.dense())
        error = relative_error(first.dense() * second.dense(), matrix)
        if errors and not error < errors[-1]:
            break
        errors.append(error)
        best = first, second
        if len(errors) > 1 and error > errors[-2] * (1 - SETTLED):
            break
    return best, errors


def _refit(matrix: Tensor, product: LowRank, other: Tensor) -> LowRank:
    """`product` with both factors fitted in turn, so that its elementwise product with `other` is nearer to `matrix`."""
    up = _refit_rows(matrix, product.up, product.down, other)
    return LowRank(up, _refit_rows(matrix.mT, product.down.mT, up.mT, other.mT).mT)


def _refit_rows(matrix: Tensor, up: Tensor, down: Tensor, other: Tensor) -> Tensor:
    """The `up` that minimises |(up @ down) * other - matrix|: for each row a system of its own, (r, r).

    A trace of the distance to the former `up` is minimised with it, so that a singular system moves nothing it does not see.
    """
    rank = down.shape[0]
    pairs = (down.unsqueeze(0) * down.unsqueeze(1)).flatten(0, 1)  # (r * r, columns)
    normal = (other.square() @ pairs.mT).unflatten(1, (rank, rank))
    trace = normal.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e-12
    weight = torch.where(trace > 0, trace, torch.ones_like(trace)).unsqueeze(-1)
    normal = normal + torch.diag_embed(weight.expand(-1, rank))
    wanted = (matrix * other) @ down.mT + weight * up
    return torch.linalg.solve(normal, wanted)


def _mean_square(product: Tensor) -> float:
    return float(product.square().mean())


def _evened(product: LowRank, mean: float, like: Tensor) -> LowRank:
    """The product at a root mean square of `mean`, its size shared by both factors, with the kernel and dtype of the weight `like`."""
    size = _mean_square(product.dense()) ** 0.5
    ratio = (_mean_square(product.down) / max(_mean_square(product.up), 1e-300)) ** 0.25 or 1.0
    root = (mean / size) ** 0.5 if size else 0.0
    up, down = product.up * (root * ratio), product.down * (root / ratio)
    return LowRank(up.to(like.dtype), down.to(like.dtype).reshape(-1, *like.shape[1:]))
