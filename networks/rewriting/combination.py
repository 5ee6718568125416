"""Several adapter files as one: layers of one file keep their algorithm, layers of several become the exact sum."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.core.tensor_file import listing
from networks.base import Adapter
from networks.checkpoint_layers import fill_layers
from networks.difference import Difference, NormShape
from networks.members import Member
from networks.network import Network
from networks.rewriting.algebra import relative_error
from networks.rewriting.conversion import as_lora, resized, summed


@torch.no_grad()
def combined(networks: Sequence[Network], strengths: Sequence[float], checkpoint: Path | None = None) -> Network:
    """The network that changes every layer as all these together do, each times its strength; on the models of the first.

    DoRA has no strength and no sum of its own; with the base model's `checkpoint` it is made a LoRA first, exactly.
    Raises `ValueError` where it is needed and not given, and as `conversion.summed`.
    """
    found: dict[str, list[tuple[Member, float]]] = {}
    for network, strength in zip(networks, strengths, strict=True):
        for member in network.members:
            found.setdefault(member.target.name, []).append((member, strength))
    rescaled = [member for parts in found.values() if len(parts) > 1 or parts[0][1] != 1 for member, _ in parts if _is_dora(member)]
    if rescaled and checkpoint is None:
        raise ValueError(
            f"{listing((member.target.name for member in rescaled), 2)}: DoRA rescales the whole weight, so it has no strength "
            "other than 1 and no sum with others; give the base model, and it becomes a LoRA, or merge into the base model"
        )
    if rescaled and checkpoint is not None:
        fill_layers(rescaled, checkpoint)
    first = networks[0]
    targets = (target for part, module in first.parts for target in first.naming.targets(part, module))
    order = {target.name: n for n, target in enumerate(targets)}
    members = [
        Member(adapter=_combined(found[name]), part=found[name][0][0].part, target=found[name][0][0].target)
        for name in sorted(found, key=lambda name: order.get(name, len(order)))
    ]
    return Network(members, first.naming, first.parts)


@torch.no_grad()
def truncated(
    network: Network, rank: int | None, max_error: float | None, dtype: torch.dtype = torch.float32
) -> tuple[Network, dict[str, float]]:
    """The network with every adapter that has a rank resized (see `conversion.resized`), and the relative error by adapter name.

    The errors are those of the tensors as they are written, in `dtype`. Raises `ValueError` for values that it cannot hold.
    """
    errors: dict[str, float] = {}
    members: list[Member] = []
    for member in network.members:
        adapter = member.adapter
        if adapter.is_algorithm:
            adapter, _ = resized(adapter, rank=rank, max_error=max_error)
            errors[adapter.name] = _written_error(adapter, member.adapter, dtype)
        members.append(Member(adapter=adapter, part=member.part, target=member.target))
    return Network(members, network.naming, network.parts), errors


def structure(network: Network) -> dict[str, str]:
    """`ss_network_module`, `_dim` and `_alpha` of a network; `Dynamic`, as sd-scripts writes it, where layers differ."""
    modules = Counter(type(adapter).__module__ for adapter in network.adapters if adapter.is_algorithm)
    values: Mapping[str, set[str]] = {
        "ss_network_dim": {str(adapter.rank) for adapter in network.adapters if adapter.is_algorithm},
        "ss_network_alpha": {f"{float(adapter.alpha):g}" for adapter in network.adapters if adapter.is_algorithm},
    }
    module = modules.most_common(1)[0][0] if modules else "networks.lora"
    return {"ss_network_module": module} | {key: value.pop() if len(value) == 1 else "Dynamic" for key, value in values.items()}


def _written_error(adapter: Adapter, wanted: Adapter, dtype: torch.dtype) -> float:
    """How far `adapter` is from `wanted` once it is stored in `dtype`: 0 where it is the same, number by number."""
    tensors = adapter.file_tensors()
    rounded = {name: tensor if name == "alpha" else tensor.to(dtype) for name, tensor in tensors.items()}
    if adapter is wanted and all(torch.equal(rounded[name].to(tensor), tensor) for name, tensor in tensors.items()):
        return 0.0
    if not all(torch.isfinite(tensor).all() for tensor in rounded.values()):
        short = str(dtype).removeprefix("torch.")
        raise ValueError(f"{adapter.name}: holds values that {short} cannot; choose --precision bf16 or float")
    stored = type(adapter).from_tensors(adapter.name, adapter.layer, rounded)
    return relative_error(stored.direction(), wanted.direction())


def _combined(parts: Sequence[tuple[Member, float]]) -> Adapter:
    """One adapter for those of one layer; the base weight is in the layer where DoRA has to become a LoRA."""
    adapters, strengths = [member.adapter for member, _ in parts], [strength for _, strength in parts]
    if len(parts) > 1 or strengths != [1]:
        adapters = [as_lora(adapter)[0] if adapter.dora_scale is not None else adapter for adapter in adapters]
    if any(isinstance(adapter, Difference) for adapter in adapters):
        return _difference(adapters, strengths)
    return summed(adapters, strengths)


def _is_dora(member: Member) -> bool:
    return member.adapter.dora_scale is not None


def _difference(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Difference:
    """The sum as a whole difference, which a difference among them forces."""
    first = adapters[0]
    is_norm = any(isinstance(adapter.shape, NormShape) for adapter in adapters)
    changes = list(zip(adapters, strengths, strict=True))
    weight = sum((strength * adapter.delta_weight() for adapter, strength in changes), torch.zeros(first.shape.weight))
    biases = [strength * bias for adapter, strength in changes if (bias := adapter.delta_bias()) is not None]
    tensors: dict[str, Tensor] = {}
    if not biases or bool(weight.any()):
        tensors["w_norm" if is_norm else "diff"] = weight
    if biases:
        tensors["b_norm" if is_norm else "diff_b"] = torch.stack(biases).sum(0)
    return Difference.from_tensors(first.name, first.layer, tensors)
