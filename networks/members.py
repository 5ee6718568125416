"""Adapters in their places, and how the tensors of a file become adapters: each layer by the algorithm that wrote it."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

import networks
from library.core.log import get_logger
from library.core.tensor_file import listing
from library.models.naming import Part, Target
from networks.base import Adapter
from networks.formats.kohya import NameTable, by_layer

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One adapter of a network and its place in the model."""

    adapter: Adapter
    part: Part
    target: Target


@cache
def algorithms() -> tuple[type[Adapter], ...]:
    """Every algorithm there is: the adapters defined in the modules of this package."""
    found: list[type[Adapter]] = []
    for info in pkgutil.iter_modules(networks.__path__):
        module = importlib.import_module(f"networks.{info.name}")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Adapter)
            and value.__module__ == module.__name__
            and value is not Adapter
            and value.is_algorithm
        ]
    return tuple(found)


def algorithm_of(name: str, tensors: Mapping[str, Tensor]) -> type[Adapter]:
    """The algorithm that wrote the tensors of one layer. Raises `ValueError` naming what none of them knows."""
    known = algorithms()
    fits = [algorithm for algorithm in known if any(key in tensors for key in algorithm.signature)]
    foreign = [key for key in tensors if key != "alpha" and not any(key in algorithm.signature for algorithm in fits)]
    if foreign or len(fits) != 1:
        kinds = " or ".join(f"{algorithm.title} ({', '.join(algorithm.signature[:2])}, ...)" for algorithm in known)
        raise ValueError(
            f"{name} holds {listing(foreign or tensors)}, which is not {kinds}; Tucker cores, DoRA and other algorithms are not read yet"
        )
    return fits[0]


def read_members(tensors: Mapping[str, Tensor], table: NameTable) -> list[Member]:
    """The adapters that a file's tensors mean, in the order of the family's table.

    Raises `ValueError` for names and tensors that are not understood, and where nothing is left for the models at hand.
    """
    layers = by_layer(tensors)
    known = {key for algorithm in algorithms() for key in algorithm.signature}
    if not any(name.startswith("lora") or not known.isdisjoint(values) for name, values in layers.items()):
        raise ValueError(f"not an adapter that can be read: it holds tensors such as {listing(tensors, 2)}, and none like lora_down.weight")
    found, left_out = table.resolve(layers)
    if left_out:
        logger.warning("%d adapters are left out: no text encoder was given for %s", len(left_out), listing(left_out, 2))
    if not found:
        raise ValueError("it holds no adapter for the models at hand")
    members = []
    for name, values in found.items():
        part, target, layer = table.order[name]
        members.append(Member(adapter=algorithm_of(name, values).from_tensors(name, layer, values), part=part, target=target))
    return members
