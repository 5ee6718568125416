"""Adapters of one layer fitted to a change of its weight: LoRA by singular values, LoKr as the nearest Kronecker product, LoHa.

Which to choose: LoRA is the best product of its rank, and right where nothing is known of the change. LoKr is right for changes that are
Kronecker products, such as a LoKr that was merged in: those it finds, at a fraction of the parameters; other changes it misses widely.
LoHa has no closed form: alternating least squares end in a local minimum, and a LoRA of twice the rank, which has as many parameters, is
usually nearer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from networks.lokr import factorise
from networks.rewriting.algebra import LowRank, best_spectrum, check_wish, relative_error
from networks.rewriting.factors import parameters, write_loha, write_lokr, write_lora
from networks.rewriting.fitting import KronFit, nearest_hadamard, nearest_kron, powers_of_two

FACTORS = (1, 2, 4, 8, 16, 32, 64, -1)  # that a search tries, all of which trainers accept; 1 is a LoRA, written as LoKr


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """The canonical tensors of one layer, and how near they are to the change that was asked for."""

    tensors: dict[str, Tensor]
    error: float  # relative to the norm of the change
    rank: int

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return parameters(self.tensors)


def extract_lora(delta: Tensor, *, rank: int | None = None, max_error: float | None = None) -> Extracted:
    """The LoRA of a change (o, i, *k): the best of `rank`, or of the lowest rank with that error, or with both of `rank` at most.

    Raises `ValueError` where neither is given, and as `check_wish`.
    """
    _check_size("LoRA", rank, max_error)
    spectrum, kept = best_spectrum(delta, rank, max_error)
    product = spectrum.low_rank(kept)
    return Extracted(tensors=write_lora(product), error=relative_error(product.dense(), delta), rank=kept)


def extract_lokr(delta: Tensor, *, rank: int | None = None, max_error: float | None = None, factor: int | None = -1) -> Extracted:
    """The LoKr of a change (o, i, *k), split by `factor` as in training.

    w2 is whole, or with `rank` of that rank, or with `max_error` of the lowest rank with that error (whole where there is none).
    `factor=None` searches for the split, and chooses by error and parameters: of those that have `max_error` the one with the fewest
    parameters; where none has it, or only `rank` is given, the nearest of those that have no more parameters than a LoRA of `rank`.
    Raises `ValueError` for a search with neither, and as `check_wish`.
    """
    check_wish(rank, max_error)
    o, i = delta.shape[:2]
    if factor is not None:
        return _from_kron(nearest_kron(delta, factorise(o, factor)[0], factorise(i, factor)[0], rank=rank, max_error=max_error))
    _check_size("LoKr with a searched factor", rank, max_error)
    budget = None if rank is None else rank * (o + delta[0].numel())
    found: list[Extracted] = []
    for a, b in dict.fromkeys((factorise(o, factor)[0], factorise(i, factor)[0]) for factor in FACTORS):
        found.append(_within(delta, a, b, budget, max_error, limit=min((fit.error for fit in found), default=1.0)))
    small = [fit for fit in found if budget is None or fit.parameters <= budget + 1]  # a LoRA with a w1 of one number is
    near = [fit for fit in small if max_error is not None and fit.error <= max_error]
    return min(near, key=lambda fit: (fit.parameters, fit.error)) if near else min(small, key=lambda fit: (fit.error, fit.parameters))


def extract_loha(delta: Tensor, *, rank: int | None = None, max_error: float | None = None) -> Extracted:
    """A LoHa of a change (o, i, *k): of `rank`, or of the lowest power of two with that error; `rank` bounds that, or the weight's size.

    Raises `ValueError` where neither is given, and as `check_wish`.
    """
    _check_size("LoHa", rank, max_error)
    o, columns = delta.flatten(1).shape
    most = rank if rank is not None else max(1, o * columns // (2 * (o + columns)))
    for candidate in (most,) if max_error is None else powers_of_two(most):
        fit = nearest_hadamard(delta, candidate)
        if candidate == most or (max_error is not None and fit.error <= max_error):
            return Extracted(tensors=write_loha(fit.first, fit.second), error=fit.error, rank=candidate)
    raise AssertionError("the last candidate is returned")


EXTRACTORS: dict[str, Callable[..., Extracted]] = {"lora": extract_lora, "lokr": extract_lokr, "loha": extract_loha}


def _check_size(what: str, rank: int | None, max_error: float | None) -> None:
    check_wish(rank, max_error)
    if rank is None and max_error is None:
        raise ValueError(f"{what}: a size was not given: neither rank nor max_error")


def _within(delta: Tensor, a: int, b: int, budget: int | None, max_error: float | None, limit: float) -> Extracted:
    """The fit of one split of the search: w2 whole where the budget of parameters allows it, else of the highest rank that it allows.

    `limit` is the smallest error so far. Where no w2 of this split can have it, the whole one stands for all, above the budget or not.
    """
    c, columns = delta.shape[0] // a, delta[0].numel() // b
    left = budget - (a * b if a * b > 1 else 0) if budget is not None else c * columns  # a w1 of one number is but a scale
    rank = None if c * columns <= left else max(1, left // (c + columns))
    return _from_kron(nearest_kron(delta, a, b, rank=rank, max_error=max_error, limit=limit if max_error is None else None))


def _from_kron(fit: KronFit) -> Extracted:
    rank = fit.w2.rank if isinstance(fit.w2, LowRank) else max(fit.w2.shape[:2])
    return Extracted(tensors=write_lokr(fit.w1, fit.w2), error=fit.error, rank=rank)
