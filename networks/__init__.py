"""Adapters: changes of layers. One algorithm a file; `networks.api` is the way in for Python, `create_network` for trainers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from networks.api import attached_names, create_network, create_network_from_weights, set_adapters

__all__ = ["attached_names", "create_network", "create_network_from_weights", "set_adapters"]


def __getattr__(name: str) -> Any:
    """The Python API, imported once it is asked for: the modules of this package import each other through it."""
    if name not in __all__:
        raise AttributeError(f"module 'networks' has no attribute '{name}'")
    from networks import api

    return getattr(api, name)
