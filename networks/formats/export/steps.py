"""Exact rewriting of a layer: the same delta in other words. Each step leaves alone what it does not apply to."""

import torch
from torch import Tensor

from networks.algebra import LowRank
from networks.base import Adapter
from networks.conversion import CORES, as_lora, flat
from networks.difference import Difference, NormShape
from networks.factors import parameters, read_lokr, write_lokr
from networks.formats.export.entry import Bases, Entry, Refusal, Wishes
from networks.lokr import LoKr
from networks.lora import LoRA

AS_LORA = "add --as_lora"
BAKE = "--as_lora with --base bakes it into a LoRA"


def without_core(entry: Entry) -> Entry:
    """Tucker cores multiplied into flat factors of the same rank."""
    return entry.rewritten(flat(entry.adapter), "Tucker core multiplied out") if has_core(entry.adapter) else entry


def with_whole_w1(entry: Entry) -> Entry:
    """LoKr's first factor stored whole (decompose_both undone)."""
    if not isinstance(entry.adapter, LoKr) or entry.adapter.split.rank1 is None:
        return entry
    w1, w2 = _factors(entry.adapter)
    return _kronecker(entry, _whole(w1), w2, "LoKr's first factor multiplied out")


def with_whole_w2(entry: Entry) -> Entry:
    """LoKr's second factor stored whole."""
    if not isinstance(entry.adapter, LoKr) or entry.adapter.split.rank2 is None:
        return entry
    w1, w2 = _factors(entry.adapter)
    return _kronecker(entry, w1, _whole(w2), "LoKr's second factor multiplied out")


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
    is_bare = isinstance(adapter, LoRA) and adapter.dora_scale is None and not has_core(adapter)
    if is_bare and not wishes.truncates:
        return entry
    source, what = adapter, adapter.title
    if adapter.dora_scale is not None:
        base = bases.weight(entry.member)
        if base is None:
            raise Refusal("DoRA, which becomes a LoRA only with the weights that it rescales; add --base with the checkpoint")
        source, what = dense(adapter, base), f"{what} with DoRA"
    lora, error = as_lora(source, rank=wishes.rank, max_error=wishes.max_error)
    return entry.rewritten(lora, f"{what} truncated" if is_bare else f"{what} as LoRA", error=error if wishes.truncates else 0.0)


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


def has_core(adapter: Adapter) -> bool:
    """Whether the adapter has Tucker cores."""
    return any(name in CORES for name, _ in adapter.named_parameters())


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
