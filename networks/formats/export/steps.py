"""Exact rewriting of a layer: the same delta in other words. Each step leaves alone what it does not apply to."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from networks.base import Adapter
from networks.difference import Difference, NormShape
from networks.formats.export.entry import Bases, Entry, Refusal, Wishes
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.rewriting.algebra import LowRank
from networks.rewriting.conversion import CORES, as_lora, flat
from networks.rewriting.factors import parameters, read_lokr, wide, write_lokr

AS_LORA = "add --as_lora"
BAKE = "--as_lora with --base bakes it into a LoRA"


def without_core(entry: Entry) -> Entry:
    """Tucker cores multiplied into flat factors of the same rank."""
    return entry.rewritten(flat(entry.adapter), "Tucker core multiplied out") if has_core(entry.adapter) else entry


def with_whole_w1(entry: Entry) -> Entry:
    """LoKr's first factor stored whole (decompose_both undone)."""
    adapter = entry.adapter
    if not isinstance(adapter, LoKr) or adapter.split.rank1 is None:
        return entry
    tensors = adapter.file_tensors()
    w1 = wide(tensors.pop("lokr_w1_a")) @ wide(tensors.pop("lokr_w1_b"))
    if adapter.split.rank2 is None:  # no reader applies a scale to two whole factors
        w1, tensors["alpha"] = w1 * adapter.scale, torch.tensor(float(max(adapter.split.c, adapter.split.d)))
    return entry.remade(tensors | {"lokr_w1": w1}, "LoKr's first factor multiplied out")


def with_whole_w2(entry: Entry) -> Entry:
    """LoKr's second factor stored whole."""
    if not isinstance(entry.adapter, LoKr) or entry.adapter.split.rank2 is None:
        return entry
    w1, w2 = _factors(entry.adapter)
    return _kronecker(entry, w1, _whole(w2), "LoKr's second factor multiplied out")


def with_low_rank(entry: Entry) -> Entry:
    """LoKr's second factor stored whole where its rank is at least half its larger side: many readers expect it whole then."""
    adapter = entry.adapter
    is_high = (
        isinstance(adapter, LoKr) and adapter.split.rank2 is not None and adapter.split.rank2 >= max(adapter.split.c, adapter.split.d) / 2
    )
    return with_whole_w2(entry) if is_high else entry


def with_identity(entry: Entry) -> Entry:
    """LoKr's whole second factor as the product of an identity and its flattened self."""
    if not isinstance(entry.adapter, LoKr) or entry.adapter.split.rank2 is not None:
        return entry
    w1, w2 = _factors(entry.adapter)
    weight = _whole(w2)
    return _kronecker(entry, w1, LowRank(torch.eye(weight.shape[0], dtype=weight.dtype), weight), "LoKr's second factor times an identity")


def converted(entry: Entry, wishes: Wishes, bases: Bases) -> Entry:
    """The layer as a LoRA without DoRA and Tucker core, exactly or as the wishes say. Raises `Refusal` for what no LoRA can hold."""
    adapter = entry.adapter
    if isinstance(adapter, Difference) and (adapter.delta_bias() is not None or isinstance(adapter.shape, NormShape)):
        raise Refusal("differences of norms and biases, which no LoRA can hold; --to comfyui and --to lycoris keep them")
    is_lora = isinstance(adapter, LoRA)
    if is_lora and adapter.dora_scale is None and not wishes.truncates:
        return without_core(entry)
    note = f"{adapter.title} truncated" if is_lora else f"{adapter.title} as LoRA"
    if adapter.dora_scale is not None:
        base = bases.weight(entry.member)
        if base is None:
            raise Refusal("DoRA, which becomes a LoRA only with the weights that it rescales; add --base with the checkpoint")
        adapter, note = dense(adapter, base), f"{entry.adapter.title} with DoRA as LoRA"
    lora, error = as_lora(adapter, rank=wishes.rank, max_error=wishes.max_error)
    return entry.rewritten(lora, note, error=error if wishes.truncates else 0.0)


def as_small_lora(entry: Entry) -> Entry:
    """The layer as a LoRA that keeps its magnitudes, or as a whole difference where that is smaller and there are none."""
    adapter = entry.adapter
    magnitudes = {} if adapter.dora_scale is None else {"dora_scale": adapter.dora_scale.detach()}
    lora, _ = as_lora(bare(adapter))
    tensors = lora.file_tensors()
    if not magnitudes and parameters(tensors) > adapter.direction().numel():
        return entry.rewritten(dense(adapter), f"{adapter.title} as whole difference")
    return entry.rewritten(LoRA.from_tensors(adapter.name, adapter.layer, tensors | magnitudes), f"{adapter.title} as LoRA")


# Adapters


def common_factor(entries: Iterable[Entry], side: Callable[[int, int], int]) -> int | None:
    """The one factor that gives every LoKr the sides of its w1, `side` saying what a reader derives of a size and a factor.

    -1 (as even as possible) where that does, and without LoKrs; None where no factor does.
    """
    lokrs = [entry.adapter for entry in entries if isinstance(entry.adapter, LoKr)]
    sizes = {pair for lokr in lokrs for pair in ((lokr.shape.out, lokr.split.a), (lokr.shape.inner, lokr.split.b))}
    own = {factor for size, first in sizes for factor in (first, size // first)}
    more = range(1, 2 * max((first for _, first in sizes), default=0) + 1)  # one that divides no size may do what none of those does
    return next((factor for factor in (-1, *sorted(own), *more) if all(side(size, factor) == first for size, first in sizes)), None)


def has_core(adapter: Adapter) -> bool:
    """Whether the adapter has Tucker cores."""
    return any(name in CORES for name, _ in adapter.named_parameters())


def cores(entries: Iterable[Entry]) -> set[bool]:
    """Whether the layers that can have a Tucker core have one: both, where readers have one switch for all, is too much."""
    return {has_core(entry.adapter) for entry in entries if not entry.adapter.shape.is_pointwise and not is_whole(entry.adapter)}


def is_whole(adapter: Adapter) -> bool:
    """Whether the adapter is a LoKr with a whole second factor."""
    return isinstance(adapter, LoKr) and adapter.split.rank2 is None


def bare(adapter: Adapter) -> Adapter:
    """The adapter without DoRA's magnitudes."""
    if adapter.dora_scale is None:
        return adapter
    tensors = {name: tensor for name, tensor in adapter.file_tensors().items() if name != "dora_scale"}
    return type(adapter).from_tensors(adapter.name, adapter.layer, tensors)


def dense(adapter: Adapter, base: Tensor | None = None) -> Difference:
    """The whole change of the weight as a difference; DoRA's is that of `base`."""
    return Difference.from_tensors(adapter.name, adapter.layer, {"diff": adapter.delta_weight(base).detach()})


def _factors(adapter: LoKr) -> tuple[Tensor | LowRank, Tensor | LowRank]:
    return read_lokr(adapter.file_tensors(), adapter.shape)


def _whole(factor: Tensor | LowRank) -> Tensor:
    return factor.dense() if isinstance(factor, LowRank) else factor


def _kronecker(entry: Entry, w1: Tensor | LowRank, w2: Tensor | LowRank, note: str) -> Entry:
    magnitude = entry.adapter.dora_scale
    kept = {} if magnitude is None else {"dora_scale": magnitude.detach()}
    return entry.remade(write_lokr(w1, w2, entry.adapter.scale) | kept, note)
