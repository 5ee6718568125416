"""The contract of an adapter: a small set of parameters that means a change of one layer's weight.

An algorithm is one subclass in one file. Its attribute names are the file's names, so `state_dict()` is the file's content; its
`formula()` is the only place that says what the parameters mean; `delta(x)` is a cheaper way to the same output.
The base output and the delta are computed apart and added: W + dW in half precision would round a small delta away.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import LayerShape
from networks.stack import stack_of


@dataclass(frozen=True, kw_only=True)
class Dropouts:
    """Probabilities of the three dropouts, each in [0, 1); they act in training mode only and keep the expected output.

    `neuron`: elements of the delta's input. `rank`: ranks, per sample; rows of the delta where there is no rank to drop.
    `module`: the whole delta of a layer in a step; the exception: as in sd-scripts, what remains is not scaled up.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class Adapter(nn.Module, ABC):
    """A change of one layer. Not a submodule of the layer, nor the layer of it; parameters are float32 while training."""

    title: ClassVar[str]  # for messages: LoHa
    signature: ClassVar[tuple[str, ...]]  # parameter names by which a file's entry is known: any of them
    boosted: ClassVar[tuple[str, ...]]  # parameters whose rate LoRA+ multiplies, by the start of their name
    Arguments: ClassVar[type]  # the network arguments: a subclass of networks.selection.NetworkArguments

    layer: nn.Module
    alpha: Tensor  # float32, 0-d, saved; `scale` is what it means
    scale: float

    def __init__(self, name: str, layer: nn.Module, *, rank: int, alpha: float, dropouts: Dropouts | None = None) -> None:
        super().__init__()
        self.name = name
        object.__setattr__(self, "layer", layer)  # past nn.Module, which would take it for a part of the adapter
        self.shape = LayerShape.of(layer)
        self.rank = rank
        self.multiplier = 1.0
        self.enabled = True
        self.is_merged = False
        self.dropouts = dropouts or Dropouts()
        self.register_buffer("alpha", torch.empty(()))
        self._alpha = 0.0
        self.set_alpha(alpha)

    # What an algorithm answers

    @classmethod
    def fresh(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: Any) -> "Adapter":
        """A new adapter with a delta of zero; `arguments` are the network arguments, for algorithms that have some of their own."""
        adapter = cls(name, layer, rank=rank, alpha=alpha)
        adapter.initialise()
        return adapter

    @classmethod
    @abstractmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "Adapter":
        """The adapter that a file's tensors mean, its structure read from their shapes. Raises `ValueError`."""

    @abstractmethod
    def initialise(self) -> None:
        """Fill the parameters for a delta of zero that every parameter can leave."""

    @abstractmethod
    def formula(self) -> Tensor:
        """The delta without its scale, in any shape with the weight's elements in the weight's order."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which the delta is computed outside autocast."""

    @classmethod
    def remarks(cls, adapters: Sequence["Adapter"]) -> list[str]:
        """What the user should be told once about a whole network of freshly made adapters."""
        return []

    # The delta

    def delta_weight(self) -> Tensor:
        """The change of the weight at multiplier 1, in its shape, computed in float32 or better."""
        with torch.autocast(self.alpha.device.type, enabled=False):
            return (self.formula() * self.scale).reshape(self.shape.weight)

    def delta(self, x: Tensor) -> Tensor:
        """The change of the output for `x` at multiplier 1; here by the whole weight, in algorithms by something cheaper."""
        return self.drop_rows(self.shape.apply(x, self.delta_weight().to(x.dtype)), x)

    def forward(self, x: Tensor) -> Tensor:
        """The delta as it is trained: with dropouts, in autocast's dtype or the parameters'."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        if not self.training:
            return self.delta(x)
        if self.dropouts.neuron:
            x = F.dropout(x, self.dropouts.neuron)
        y = self.delta(x)
        if self.dropouts.module:  # a factor rather than a branch: no host sync, and every rank has a gradient
            y = y * (torch.rand((), device=y.device) >= self.dropouts.module).to(y.dtype)
        return y

    def wide(self, parameter: Tensor) -> Tensor:
        """A parameter in at least float32, for `formula`."""
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))

    @property
    def drops_ranks(self) -> bool:
        """Whether rank dropout acts now."""
        return self.training and self.dropouts.rank > 0

    def kept(self, x: Tensor, size: int) -> Tensor:
        """Factors (batch, size) for the batch of `x`: 0 where dropped, 1/(1-p) where kept."""
        ones = torch.ones((*self.shape.batch_of(x), size), device=x.device, dtype=x.dtype)
        return F.dropout(ones, self.dropouts.rank)

    def drop_rows(self, y: Tensor, x: Tensor) -> Tensor:
        """Rank dropout for a delta without a rank: whole output channels, per sample."""
        return y * self.shape.along_channels(self.kept(x, self.shape.out), y) if self.drops_ranks else y

    # Attaching and merging

    def attach(self) -> None:
        """Add this delta to the layer's output from now on."""
        if not self.is_attached:
            stack_of(self.layer).attach(self)

    def detach(self) -> None:
        """Stop adding it; without other adapters the layer has its original forward back."""
        if self.is_attached:
            stack_of(self.layer).detach(self)

    @property
    def is_attached(self) -> bool:
        """Whether the layer's forward runs this adapter."""
        stack = self.layer.__dict__.get("_adapter_stack")
        return stack is not None and any(adapter is self for adapter in stack.attached)

    def merge(self, *, keep: bool = True) -> None:
        """Add multiplier * delta to the layer's weight: summed in float32, rounded once. `keep` allows `unmerge`."""
        if not self.is_merged:
            stack_of(self.layer).merge(self, keep)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit. Raises `ValueError` where no copy was kept."""
        if self.is_merged:
            stack_of(self.layer).unmerge(self)

    # Values

    def set_alpha(self, alpha: float) -> None:
        """Set alpha, and with it the scale alpha/rank; 0 means the rank itself."""
        self._alpha = float(alpha) or float(self.rank)
        self.scale = self._alpha / self.rank
        self.alpha = torch.tensor(self._alpha, dtype=torch.float32, device=self.alpha.device)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a file. Raises `ValueError` naming missing, foreign and misshapen ones."""
        own = dict(self.named_parameters())
        problems = [f"lacks {key}" for key in own if key not in tensors]
        problems += [f"has {key}, which this {self.title} has not" for key in tensors if key not in own and key != "alpha"]
        if problems:
            raise ValueError(f"{self.name}: the file {', '.join(problems)}")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(fitted(tensors[key], tuple(parameter.shape), f"{self.name}.{key}"))
        self.set_alpha(self.stored_alpha(tensors.get("alpha")))

    def stored_alpha(self, alpha: Tensor | None) -> float:
        """The alpha of a file: without one, the rank. Raises `ValueError` for one that is no number."""
        if alpha is None:
            return float(self.rank)
        value = float(alpha) if alpha.numel() == 1 else math.nan
        if not math.isfinite(value):
            raise ValueError(f"{self.name}.alpha: {alpha.tolist()} is not a finite number")
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> "Adapter":
        """`.to(...)`, `.half()`, `.cuda()`: alpha follows the device and stays float32."""
        super()._apply(fn, recurse)
        self.alpha = torch.tensor(self._alpha, dtype=torch.float32, device=self.alpha.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None and not alpha.is_meta:
            self.set_alpha(self.stored_alpha(alpha))


def fitted(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """`tensor` in `shape`, where only the writing differs: (r, i*k*k) or (r, i, k, k), with or without trailing ones.

    Raises `ValueError` naming both shapes otherwise.
    """
    if tensor.dim() == 0 or tensor.shape[0] != shape[0] or tensor.numel() != math.prod(shape):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; {list(shape)} was expected")
    return tensor.reshape(shape)
