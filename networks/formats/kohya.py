"""The layout of kohya-ss/sd-scripts and LyCORIS: `<adapter name>.<parameter>`, names being dotted paths with underscores."""

from collections.abc import Mapping

from torch import Tensor

from library.core.tensor_file import listing
from networks.formats.keys import by_name
from networks.formats.names import NameTable

__all__ = ["NameTable", "by_layer"]


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapter name, by parameter. Raises `ValueError` naming keys that have no parameter part."""
    layers = by_name(tensors)
    wrong = layers.bare + layers.twice
    if wrong:
        raise ValueError(f"not an adapter: {listing(wrong)} {'is' if len(wrong) == 1 else 'are'} not of the form <name>.<parameter>")
    return {name: {parameter: tensors[key] for parameter, key in keys.items()} for name, keys in layers.keys.items()}
