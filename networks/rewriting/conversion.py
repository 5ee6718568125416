"""Adapters as other adapters: as LoRA, without Tucker cores, of a lower rank, and several of one layer as one.

Errors are relative to the norm of the change of the weight; 0.0 says that the result is exact up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from networks.base import Adapter
from networks.difference import Difference, NormShape
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.rewriting.algebra import (
    LowRank,
    Spectrum,
    best_spectrum,
    check_wish,
    concatenated,
    dense_spectrum,
    exact_product,
    hadamard_product,
    kron_product,
    kron_spectrum,
    narrowed,
    product_spectrum,
    rank_for,
    relative_error,
    smaller_side,
)
from networks.rewriting.factors import parameters, read_loha, read_lokr, read_lora, write_loha, write_lokr, write_lora
from networks.rewriting.fitting import nearest_hadamard, powers_of_two

CORES = ("lora_mid.weight", "hada_t1", "lokr_t2")


def as_lora(adapter: Adapter, *, rank: int | None = None, max_error: float | None = None) -> tuple[LoRA, float]:
    """The adapter as a LoRA, and the relative error.

    Exact without `rank` and `max_error`: LoHa at rank r * r, LoKr at rank(w1) * rank(w2), and never above the weight's smaller side. Else
    the best LoRA of that rank, or of the lowest rank with that error, or with both: of `rank` at most. What is no product of factors
    (DoRA, whole differences) is decomposed as a dense weight.
    Raises `ValueError` for DoRA without its base weight, for changes that a LoRA cannot hold, and as `check_wish`.
    """
    check_wish(rank, max_error)
    if isinstance(adapter.shape, NormShape) or adapter.delta_bias() is not None:
        what = "is the change of a norm" if isinstance(adapter.shape, NormShape) else "changes the bias of its layer"
        raise ValueError(f"{adapter.name}: {what}, which no LoRA can hold")
    if adapter.dora_scale is None:
        for algorithm, convert in AS_PRODUCT.items():
            if isinstance(adapter, algorithm):
                product, error = convert(adapter, rank, max_error)
                return _made(LoRA, adapter, write_lora(product, adapter.scale)), error
    delta = whole_change(adapter)
    if rank is None and max_error is None:
        product = exact_product(delta)
    else:
        spectrum, kept = best_spectrum(delta, rank, max_error)
        product = spectrum.low_rank(kept)
    return _made(LoRA, adapter, write_lora(product)), relative_error(product.dense(), delta)


def flat(adapter: Adapter) -> Adapter:
    """The adapter without Tucker cores: the same algorithm at the same rank, exactly; itself where it has none."""
    tensors = adapter.file_tensors()
    if not any(core in tensors for core in CORES):
        return adapter
    if isinstance(adapter, LoRA):
        written = write_lora(read_lora(tensors, adapter.shape))
    elif isinstance(adapter, LoHa):
        written = write_loha(*read_loha(tensors, adapter.shape))
    else:
        written = write_lokr(*read_lokr(tensors, adapter.shape))
    kept = {name: tensors[name] for name in ("alpha", "dora_scale") if name in tensors}
    return _made(type(adapter), adapter, written | kept)


def resized(adapter: Adapter, *, rank: int | None = None, max_error: float | None = None) -> tuple[Adapter, float]:
    """The adapter at a lower rank by the same algorithm, and the relative error; itself where it is no wider already.

    Without `rank` it also stays where the lower rank is no smaller: a Tucker core has to be multiplied out.

    LoRA and LoKr: the best there is, for LoKr with its w1 and the wished rank being that of w2. LoHa: a local optimum of alternating least
    squares. With DoRA the magnitudes are kept, and the error is that of the direction. Raises `ValueError` where neither is given,
    for algorithms without a rank, and as `check_wish`.
    """
    check_wish(rank, max_error)
    if rank is None and max_error is None:
        raise ValueError("a new size was not given: neither rank nor max_error")
    for algorithm, shrink in RESIZERS.items():
        if isinstance(adapter, algorithm):
            tensors, error = shrink(adapter, rank, max_error)
            if tensors is None:
                return adapter, 0.0
            return _made(algorithm, adapter, tensors | _magnitudes(adapter)), error
    raise ValueError(f"{adapter.name}: a {adapter.title} has no rank to lower; as a LoRA it has")


def summed(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Adapter:
    """One adapter that changes the layer as all these together do, each times its strength. Exact.

    One adapter stays what it is, LoKrs with the same w1 stay a LoKr, other algorithms become a LoRA of the sum of their ranks. With whole
    differences among them, or DoRA, whose base weight is needed then, the sum is a whole difference.
    Raises `ValueError` for none, for layers of different shapes, and for DoRA without its base weight.
    """
    assert len(adapters) == len(strengths)
    if not adapters:
        raise ValueError("no adapters to add up")
    shapes = dict.fromkeys(adapter.shape.weight for adapter in adapters)
    if len(shapes) > 1:
        raise ValueError(f"{adapters[0].name}: adapters of layers of different shapes: {', '.join(str(list(shape)) for shape in shapes)}")
    if len(adapters) == 1 and (adapters[0].dora_scale is None or strengths[0] == 1):
        return _scaled(adapters[0], strengths[0])
    if any(adapter.dora_scale is not None or isinstance(adapter, Difference) for adapter in adapters):
        return _summed_dense(adapters, strengths)
    return _summed_lokr(adapters, strengths) or _summed_lora(adapters, strengths)


def whole_change(adapter: Adapter) -> Tensor:
    """The change of the weight in float32 or better. Raises `ValueError` for DoRA without the base weight that it rescales."""
    try:
        return adapter.delta_weight().detach()
    except ValueError as error:
        raise ValueError(f"{adapter.name}: DoRA rescales the base weight, and {error}; give the base model") from None


# As a product, with its error; the scale is left out


def _lora_product(adapter: LoRA, rank: int | None, max_error: float | None) -> tuple[LowRank, float]:
    product = read_lora(adapter.file_tensors(), adapter.shape)
    if rank is None and max_error is None:
        return narrowed(product), 0.0
    return _truncated(product, rank, max_error)


def _loha_product(adapter: LoHa, rank: int | None, max_error: float | None) -> tuple[LowRank, float]:
    product = hadamard_product(*read_loha(adapter.file_tensors(), adapter.shape))
    if rank is None and max_error is None:
        return narrowed(product), 0.0
    return _truncated(product, rank, max_error)


def _lokr_product(adapter: LoKr, rank: int | None, max_error: float | None) -> tuple[LowRank, float]:
    factors = read_lokr(adapter.file_tensors(), adapter.shape)
    if rank is None and max_error is None:
        return kron_product(*factors), 0.0
    spectrum = kron_spectrum(*(_spectrum(factor) for factor in factors), rank=rank, max_error=max_error)
    return spectrum.low_rank(spectrum.values.numel()), spectrum.error(spectrum.values.numel())


def _truncated(product: LowRank, rank: int | None, max_error: float | None) -> tuple[LowRank, float]:
    """The best product of the wished rank; the product itself where that is no wider."""
    if max_error is None and rank is not None and rank >= product.rank:
        return product, 0.0
    spectrum = product_spectrum(product)
    kept = rank_for(spectrum.values, rank, max_error)
    return spectrum.low_rank(kept), spectrum.error(kept)


def _spectrum(factor: Tensor | LowRank) -> Spectrum:
    return product_spectrum(factor) if isinstance(factor, LowRank) else dense_spectrum(factor)


AS_PRODUCT: dict[type[Adapter], Callable[..., tuple[LowRank, float]]] = {LoRA: _lora_product, LoHa: _loha_product, LoKr: _lokr_product}


# At a lower rank: tensors, or None where the adapter is small enough, and the error


def _resized_lora(adapter: LoRA, rank: int | None, max_error: float | None) -> tuple[dict[str, Tensor] | None, float]:
    tensors = adapter.file_tensors()
    product, error = _truncated(read_lora(tensors, adapter.shape), rank, max_error)
    smaller = write_lora(product, adapter.scale)
    is_capped = rank is not None and rank < adapter.rank  # a Tucker core, multiplied out, may be larger at a smaller rank
    return (smaller, error) if is_capped or parameters(smaller) < parameters(adapter.factors()) else (None, 0.0)


def _resized_lokr(adapter: LoKr, rank: int | None, max_error: float | None) -> tuple[dict[str, Tensor] | None, float]:
    tensors = adapter.file_tensors()
    w1, w2 = read_lokr(tensors, adapter.shape)
    spectrum = _spectrum(w2)
    kept = rank_for(spectrum.values, rank, max_error)
    smaller = write_lokr(w1, spectrum.low_rank(kept), adapter.scale)
    is_capped = rank is not None and isinstance(w2, LowRank) and rank < w2.rank
    return (smaller, spectrum.error(kept)) if is_capped or parameters(smaller) < parameters(adapter.factors()) else (None, 0.0)


def _resized_loha(adapter: LoHa, rank: int | None, max_error: float | None) -> tuple[dict[str, Tensor] | None, float]:
    capped = rank is not None and rank < adapter.rank
    if adapter.rank == 1 or (max_error is None and not capped):
        return None, 0.0
    most = min(rank or adapter.rank, adapter.rank - 1)
    delta = adapter.direction().detach()
    spectra = [product_spectrum(product) for product in read_loha(adapter.file_tensors(), adapter.shape)]
    for candidate in [most] if max_error is None else powers_of_two(most):
        first, second = (spectrum.low_rank(candidate) for spectrum in spectra)
        fit = nearest_hadamard(delta, candidate, near=(first, second), starts=1)
        if (capped and candidate == most) or (max_error is not None and fit.error <= max_error):
            return write_loha(fit.first, fit.second), fit.error
    return None, 0.0


RESIZERS: dict[type[Adapter], Callable[..., tuple[dict[str, Tensor] | None, float]]] = {
    LoRA: _resized_lora,
    LoHa: _resized_loha,
    LoKr: _resized_lokr,
}


# Sums


def _summed_lokr(adapters: Sequence[Adapter], strengths: Sequence[float]) -> LoKr | None:
    """The sum of LoKrs with one w1 as a LoKr, or None for others."""
    lokrs = [adapter for adapter in adapters if isinstance(adapter, LoKr)]
    if len(lokrs) < len(adapters):
        return None
    factors = [read_lokr(lokr.file_tensors(), lokr.shape) for lokr in lokrs]
    w1 = factors[0][0]
    if any(not _equal(w1, other) for other, _ in factors[1:]):
        return None
    scales = [lokr.scale * strength for lokr, strength in zip(lokrs, strengths, strict=True)]
    products = [w2 for _, w2 in factors if isinstance(w2, LowRank)]
    if len(products) == len(factors):
        w2 = concatenated(products, scales)
        if w2.rank < smaller_side(w2):
            return _made(LoKr, lokrs[0], write_lokr(w1, w2))
    whole = [w2.dense() if isinstance(w2, LowRank) else w2 for _, w2 in factors]
    total = torch.stack([w2 * scale for w2, scale in zip(whole, scales, strict=True)]).sum(0)
    return _made(LoKr, lokrs[0], write_lokr(w1, total))


def _summed_lora(adapters: Sequence[Adapter], strengths: Sequence[float]) -> LoRA:
    """The sum as a LoRA: every adapter as one, side by side."""
    loras = [as_lora(adapter)[0] for adapter in adapters]
    scales = [lora.scale * strength for lora, strength in zip(loras, strengths, strict=True)]
    total = concatenated([read_lora(lora.file_tensors(), lora.shape) for lora in loras], scales)
    return _made(LoRA, adapters[0], write_lora(narrowed(total)))


def _summed_dense(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Difference:
    """The sum as a whole difference of the weight, and of the bias where one is changed."""
    weights = [(whole_change(adapter), strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    biases = [(adapter.delta_bias(), strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    of_weight, of_bias = ("w_norm", "b_norm") if isinstance(adapters[0].shape, NormShape) else ("diff", "diff_b")
    total = torch.stack([change * strength for change, strength in weights]).sum(0)
    shifts = [change.detach() * strength for change, strength in biases if change is not None]
    tensors = {of_bias: torch.stack(shifts).sum(0)} if shifts else {}
    if total.any() or not shifts:
        tensors[of_weight] = total
    return _made(Difference, adapters[0], tensors)


def _equal(one: Tensor | LowRank, other: Tensor | LowRank) -> bool:
    one, other = (factor.dense() if isinstance(factor, LowRank) else factor for factor in (one, other))
    return torch.equal(one, other)


def _scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter times a strength, folded into one of its factors: not every reader applies an alpha."""
    if strength == 1:
        return adapter
    tensors = adapter.file_tensors()
    places = [name for name in adapter.folds_into if name in tensors][:1] or [name for name in tensors if name != "alpha"]
    return _made(type(adapter), adapter, tensors | {place: tensors[place] * strength for place in places})


# Making


Kind = TypeVar("Kind", bound=Adapter)


def _made(algorithm: type[Kind], adapter: Adapter, tensors: Mapping[str, Tensor]) -> Kind:
    """An adapter of the same layer and name."""
    made = algorithm.from_tensors(adapter.name, adapter.layer, tensors)
    assert isinstance(made, algorithm)
    return made


def _magnitudes(adapter: Adapter) -> dict[str, Tensor]:
    return {} if adapter.dora_scale is None else {"dora_scale": adapter.dora_scale.detach()}
