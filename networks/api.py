"""The Python API: adapters on any torch model, without a trainer. Its functions are also in `networks` itself.

    import networks

    network = networks.create_network(unet, "loha", rank=8, alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    network.attach()                             # the model now computes with the deltas; the base stays as it is
    ...                                          # train network.parameters()
    network.save_weights("style.safetensors")

    style = networks.create_network_from_weights(unet, "style.safetensors", name="style")
    style.attach()
    networks.set_adapters(unet, {"style": 0.8})  # this one at 0.8, every other one off

`Network` merges and unmerges, sets strengths and lists its adapters; each adapter has `delta_weight()`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from library.core.spelling import unknown
from networks.base import Adapter
from networks.factory import as_list, new_network
from networks.members import algorithms
from networks.network import Network
from networks.stack import attached_to


def create_network(
    model: nn.Module,
    algorithm: str = "lora",
    *,
    rank: int = 4,
    alpha: float | None = None,
    name: str | None = None,
    text_encoders: nn.Module | Sequence[nn.Module] | None = (),
    dropout: float = 0.0,
    **arguments: Any,
) -> Network:
    """A new network with a delta of zero on `model`, not attached yet; `algorithm` is lora, loha or lokr.

    alpha: the delta is scaled by alpha / rank; None means the rank, a scale of 1. arguments: the network arguments of docs/adapters.md,
    as Python values; `target_modules` chooses the layers, and is needed for a model of no family that Hadron knows.
    name: by which `set_adapters` switches it. Raises `OptionError` (a `ValueError`) with everything that is wrong.
    """
    kind = _algorithm_named(algorithm)
    network = new_network(kind, model, as_list(text_encoders), rank, rank if alpha is None else alpha, dropout, arguments)
    network.rename(name)
    return network


def create_network_from_weights(
    model: nn.Module,
    file: Path | str,
    *,
    name: str | None = None,
    text_encoders: nn.Module | Sequence[nn.Module] | None = (),
    multiplier: float = 1.0,
    allow_partial: bool = False,
) -> Network:
    """The network that an adapter file or PEFT folder holds, of whatever tool and algorithms, on `model`; not attached yet.

    Raises `ValueError` naming the file and every key that does not fit; `allow_partial` warns of those and leaves them out.
    """
    network = Network.from_file(file, model, as_list(text_encoders), multiplier, allow_partial=allow_partial)
    network.rename(name)
    return network


def attached_names(model: nn.Module) -> list[str]:
    """The names of the networks that are attached to `model`, in the order of their first layers."""
    return list(dict.fromkeys(adapter.network_name for adapter in _attached(model) if adapter.network_name is not None))


def set_adapters(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Let the named networks act at these strengths, and switch every other attached one off; {} leaves the base alone.

    Raises `ValueError` for a name that is not attached, and where an attached network is merged into the weights.
    """
    names = attached_names(model)
    problems = [unknown(name, names, "attached network") for name in strengths if name not in names]
    if problems:
        raise ValueError("; ".join(problems))
    merged = dict.fromkeys(str(adapter.network_name) for adapter in _attached(model) if adapter.is_merged)
    if merged:
        raise ValueError(f"merged into the weights, and not to be switched until it is unmerged: {', '.join(merged)}")
    for adapter in _attached(model):
        adapter.enabled = adapter.network_name in strengths
        if adapter.enabled:
            adapter.multiplier = float(strengths[adapter.network_name or ""])


def _attached(model: nn.Module) -> Iterator[Adapter]:
    for module in model.modules():
        yield from attached_to(module)


def _algorithm_named(name: str) -> type[Adapter]:
    known = {algorithm.__module__.rpartition(".")[2]: algorithm for algorithm in algorithms()}
    if str(name).lower() not in known:
        raise ValueError(unknown(str(name), known, "algorithm"))
    return known[str(name).lower()]
