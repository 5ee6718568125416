"""Adapters in their places, and the algorithms that there are."""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import networks
from library.core.tensor_file import listing
from library.models.naming import Part, Target
from networks.base import Adapter

COMMON = ("alpha", "dora_scale", "scalar")  # parameters of every algorithm


@dataclass(frozen=True, kw_only=True)
class Member:
    """One adapter of a network and its place in the model."""

    adapter: Adapter
    part: Part
    target: Target


@cache
def algorithms() -> tuple[type[Adapter], ...]:
    """Every algorithm there is: the trainable adapters defined in the modules of this package."""
    found: list[type[Adapter]] = []
    for info in pkgutil.iter_modules(networks.__path__):
        module = importlib.import_module(f"networks.{info.name}")
        found += [value for value in vars(module).values() if _is_algorithm(value) and value.__module__ == module.__name__]
    return tuple(found)


def readable() -> tuple[type[Adapter], ...]:
    """Every kind of adapter that a file may hold: the algorithms, and differences."""
    from networks.difference import Difference

    return (*algorithms(), Difference)


def algorithm_of(name: str, parameters: Iterable[str]) -> type[Adapter]:
    """The kind of adapter that has these parameters. Raises `ValueError` naming what none of them knows."""
    parameters = list(parameters)
    fits = [kind for kind in readable() if not set(kind.signature).isdisjoint(parameters)]
    foreign = [key for key in parameters if key not in COMMON and not any(key in kind.signature for kind in fits)]
    if len(fits) > 1 and not foreign:
        raise ValueError(f"{name} holds tensors of {' and '.join(kind.title for kind in fits)} at once")
    if foreign or not fits:
        kinds = " or ".join(f"{algorithm.title} ({', '.join(algorithm.signature[:2])}, ...)" for algorithm in algorithms())
        raise ValueError(f"{name} holds {listing(foreign or parameters)}, which is not {kinds}; other algorithms are not read")
    return fits[0]


def _is_algorithm(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Adapter) and value is not Adapter and value.is_algorithm
