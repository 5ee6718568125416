"""The adapters of one layer: one replaced `forward` that sums them, and one ledger of what is merged into its weight."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from networks.base import Adapter

ATTRIBUTE = "_adapter_stack"


class Stack:
    """What is attached to one layer and merged into it. It exists on the layer only while it holds an adapter."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.attached: list[Adapter] = []
        self.merged: list[Adapter] = []
        self.base_forward: Any = None
        self.replaced: Any = None  # an instance attribute `forward` that stood there before ours
        self.kept_weight: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own output plus each adapter's, added apart from the base weight and rounded once."""
        y = self.base_forward(x, *args, **kwargs)
        for adapter in self.attached:
            if adapter.enabled and not adapter.is_merged and adapter.multiplier != 0:
                y = torch.add(y, adapter(x), alpha=adapter.multiplier).to(y.dtype)
        return y

    def attach(self, adapter: "Adapter") -> None:
        """Add an adapter to the forward; the first one replaces `layer.forward`."""
        if self.base_forward is None:
            self.replaced = self.layer.__dict__.get("forward")
            self.base_forward = self.layer.forward
            self.layer.forward = self.forward
        self.attached.append(adapter)

    def detach(self, adapter: "Adapter") -> None:
        """Remove an adapter from the forward; the last one restores `layer.forward` as it was found."""
        self.attached.remove(adapter)
        ours = self.layer.__dict__.get("forward") == self.forward  # else someone wraps us: stay, and pass through
        if not self.attached and ours:
            if self.replaced is None:
                del self.layer.forward
            else:
                self.layer.forward = self.replaced
            self.base_forward = self.replaced = None
        self._leave_if_empty()

    def merge(self, adapter: "Adapter", keep: bool) -> None:
        """Add an adapter to the weight. `keep` holds a copy of the weight as it was, for `unmerge`."""
        weight = self._weight(adapter)
        if not self.merged and keep:
            self.kept_weight = weight.clone()
        if self.merged and (self.kept_weight is not None) != keep:
            raise ValueError(f"{adapter.name}: the layer's other adapters were merged with keep={not keep}; merge all of a layer alike")
        self.merged.append(adapter)
        adapter.is_merged = True
        base = self.kept_weight if self.kept_weight is not None else weight
        self._write([adapter] if self.kept_weight is None else self.merged, base)

    def unmerge(self, adapter: "Adapter") -> None:
        """Take an adapter out of the weight; with the last one the weight is bit for bit what it was."""
        if self.kept_weight is None:
            raise ValueError(f"{adapter.name}: merged without a kept copy of the weight, so it cannot be taken out again")
        self.merged.remove(adapter)
        adapter.is_merged = False
        self._write(self.merged, self.kept_weight)
        if not self.merged:
            self.kept_weight = None
        self._leave_if_empty()

    # Weights

    def _weight(self, adapter: "Adapter") -> Tensor:
        weight = self.layer.weight
        if not isinstance(weight, Tensor) or tuple(weight.shape) != adapter.shape.weight or not weight.is_floating_point():
            raise ValueError(f"{adapter.name}: its layer holds a packed (quantised) weight; adapters can be attached to it, not merged")
        return weight.data

    @torch.no_grad()
    def _write(self, adapters: list["Adapter"], base: Tensor) -> None:
        if not adapters:
            self.layer.weight.data.copy_(base)
            return
        total = base.to(torch.float32 if base.itemsize < 4 else base.dtype, copy=True)
        for adapter in adapters:
            total.add_(adapter.delta_weight().to(total), alpha=adapter.multiplier)
        self.layer.weight.data.copy_(total)

    def _leave_if_empty(self) -> None:
        if not self.attached and not self.merged and self.base_forward is None:
            self.layer.__dict__.pop(ATTRIBUTE, None)


def stack_of(layer: nn.Module) -> Stack:
    """The stack of a layer, made if it has none."""
    if ATTRIBUTE not in layer.__dict__:
        layer.__dict__[ATTRIBUTE] = Stack(layer)
    return layer.__dict__[ATTRIBUTE]
