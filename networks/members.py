"""Adapters in their places, and the algorithms that there are."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

import networks
from library.models.naming import Part, Target
from networks.base import Adapter

if TYPE_CHECKING:
    from networks.formats.names import NameTable


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


def algorithm_of(name: str, tensors: Mapping[str, Tensor]) -> type[Adapter]:
    """The algorithm that wrote the tensors of one layer. Raises `ValueError` naming what none of them knows."""
    from networks.formats import reader

    return reader.algorithm_of(name, tensors)


def read_members(tensors: Mapping[str, Tensor], table: "NameTable") -> list[Member]:
    """The adapters that a file's tensors mean. Raises `ValueError`, not naming the file."""
    from networks.files import AdapterFile
    from networks.formats.reader import members_of

    return members_of(tensors if isinstance(tensors, AdapterFile) else AdapterFile(tensors=tensors), table)


def _is_algorithm(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Adapter) and value is not Adapter and value.is_algorithm
