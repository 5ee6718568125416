"""What an adapter of any algorithm may have besides its factors: dropouts, a learned scalar, DoRA's magnitudes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from networks import dora
from networks.layers import LayerShape


@dataclass(frozen=True, kw_only=True)
class Dropouts:
    """Probabilities of the three dropouts, each in [0, 1); they act in training mode only and keep the expected output.

    `neuron`: elements of the delta's input. `rank`: ranks, per sample; rows of the delta where there is no rank to drop, or
    everywhere with `rank_mode` "rows", as LyCORIS and sd-scripts do it.
    `module`: the whole delta of a layer in a step; the exception: as in sd-scripts, what remains is not scaled up.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0
    rank_mode: Literal["rank", "rows"] = "rank"

    @property
    def act(self) -> bool:
        """Whether any of them is not zero."""
        return bool(self.neuron or self.rank or self.module)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What an adapter of any algorithm may have besides its factors.

    `scalar`: a learned factor on the whole delta, which starts at zero in place of a factor; folded into a factor in files.
    `magnitude`: DoRA, and the axis of its magnitudes; `full_norm` lets gradients flow through its norm, as LyCORIS does.
    """

    scalar: bool = False
    magnitude: dora.Axis | None = None
    full_norm: bool = False

    @classmethod
    def asked(cls, arguments: Any) -> "Extras":
        """Those of the network arguments."""
        magnitude = ("out" if arguments.wd_on_output else "in") if arguments.dora_wd else None
        return cls(scalar=arguments.use_scalar, magnitude=magnitude, full_norm=arguments.dora_norm == "full")

    @classmethod
    def found(cls, name: str, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "Extras":
        """Those of a file's tensors. Raises `ValueError` for magnitudes that do not fit the layer."""
        magnitude = tensors.get("dora_scale")
        return cls(scalar="scalar" in tensors, magnitude=None if magnitude is None else dora.axis_of(shape, magnitude, name))
