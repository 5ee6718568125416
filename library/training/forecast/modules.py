"""What a network adapts: its layers with shapes, ranks and parameters, and what its file weighs."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.network import Network
from networks.protocol import TrainableNetwork

LENGTH = 8  # bytes before the header of a safetensors file, and what its length is a multiple of


@dataclass(frozen=True, kw_only=True)
class ModuleFacts:
    """One adapted layer; `shape` is its weight's, `rank` and `group` are not known of third-party networks."""

    name: str
    part: str
    group: str
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    parameters: int


def module_facts(network: TrainableNetwork) -> list[ModuleFacts]:
    """The adapters of a network in the order of its file."""
    return list(_of_ours(network) if isinstance(network, Network) else _of_others(network))


def file_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    """The size of the adapter's file: its tensors in `dtype` (alphas stay float32) and their table, without its metadata."""
    table: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        kept = torch.float32 if name.endswith(".alpha") else dtype or tensor.dtype
        begin, end = end, end + tensor.numel() * kept.itemsize
        table[name] = {"dtype": "BF16" if kept is torch.bfloat16 else "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = len(json.dumps(table, separators=(",", ":")))
    return LENGTH + math.ceil(header / LENGTH) * LENGTH + end


def file_tensors(network: TrainableNetwork) -> Mapping[str, Tensor]:
    """What the network would save."""
    return network.file_tensors() if isinstance(network, Network) else network.state_dict()


def _of_ours(network: Network) -> Iterator[ModuleFacts]:
    for member in network.members:
        adapter = member.adapter
        yield ModuleFacts(
            name=adapter.name,
            part=member.part.name,
            group=member.target.group,
            shape=tuple(adapter.shape.weight),
            rank=adapter.rank,
            alpha=adapter.scale * adapter.rank,
            parameters=_trained(adapter),
        )


def _of_others(network: nn.Module) -> Iterator[ModuleFacts]:
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        module = name.removeprefix("network.").partition(".")[0]
        counts[module] = counts.get(module, 0) + parameter.numel() * parameter.requires_grad
    for name, count in counts.items():
        yield ModuleFacts(name=name, part="", group="", shape=(), rank=None, alpha=None, parameters=count)


def _trained(adapter: nn.Module) -> int:
    return sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
