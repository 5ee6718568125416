"""The adapters of one layer: one replaced `forward` that sums them, and one ledger of what is merged into its weight and bias."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from networks.kernels.products import Base, add_base, autocast_dtype
from networks.layers import is_plain, is_product, unpacks_itself
from networks.row_blocks import write_sum

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
        self.is_product = False  # whether the layer's forward is its weight's product and its bias
        self.replaced: Any = None  # an instance attribute `forward` that stood there before ours
        self.kept: tuple[Tensor, Tensor | None] | None = None  # weight and bias as they were before the first merge

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # torch's layers name it so, and callers may
        """The layer's own output plus each adapter's change of it, summed apart from the base weight and rounded once.

        Every adapter is a change of the base alone: with two, DoRA's norm does not see the other. Only where the base computes its
        output by itself (a packed weight, a forward of its own), where the layer is a convolution, or under DoRA, has half precision
        rounded that output before.
        """
        active = [adapter for adapter in self.attached if adapter.acts]
        dtype = autocast_dtype(input)
        base = self._base(input.dtype if dtype is None else None) if active and not args and not kwargs else None
        if base is not None and len(active) == 1 and active[0].is_direct:
            x, only = input if dtype is None or dtype == input.dtype else input.to(dtype), active[0]
            return only.delta(x, base if only.multiplier == 1 else Base(base.weight, base.bias, only.multiplier))
        if base is None or any(adapter.extras.magnitude for adapter in active):
            return self._added(active, self.base_forward(input, *args, **kwargs), input)
        return self._summed(active, base, input, input.dtype if dtype is None else dtype)

    def _summed(self, active: list["Adapter"], base: Base, input: Tensor, dtype: torch.dtype) -> Tensor:
        """The base's product for `input` in `dtype`, and the adapters' deltas summed before it."""
        delta = active[0](input) * active[0].multiplier
        for adapter in active[1:]:
            delta = torch.add(delta, adapter(input), alpha=adapter.multiplier)
        return add_base(input.to(dtype), base, delta, active[0].shape)

    def _added(self, active: list["Adapter"], base: Tensor, input: Tensor) -> Tensor:
        """The adapters' deltas on an output that the base has computed."""
        y = base
        for adapter in active:
            y = torch.add(y, adapter(input, base), alpha=adapter.multiplier)
        return y.to(base.dtype)

    def _base(self, dtype: torch.dtype | None) -> Base | None:
        """The base's product for inputs of `dtype` (of any float dtype for None), where that is all the layer does and it is frozen."""
        own = self.layer._parameters  # past Module.__getattr__, which takes longer than all that follows
        if not self.is_product or "bias" not in own:  # which is not there where a parametrisation computes it
            return None
        if torch._C._are_functorch_transforms_active():  # vmap and its kind see through operations, not through our functions
            return None
        weight, bias = own.get("weight"), own["bias"]
        if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        return Base(weight, bias) if weight.dtype == dtype or (dtype is None and weight.is_floating_point()) else None

    def attach(self, adapter: "Adapter") -> None:
        """Add an adapter to the forward; the first one replaces `layer.forward`."""
        if self.base_forward is None:
            self.replaced = self.layer.__dict__.get("forward")
            self.base_forward = self.layer.forward
            self.is_product = self.replaced is None and is_product(self.layer)
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
        """Add an adapter to the weight. `keep` holds copies of weight and bias as they were, for `unmerge`.

        Raises `ValueError` as `check` does.
        """
        self.check(adapter, keep)
        weight, bias = self._values()
        if not self.merged and keep:
            self.kept = weight.clone(), None if bias is None else bias.clone()
        self.merged.append(adapter)
        adapter.is_merged = True
        if self.kept is not None:
            self._write(self.merged, *self.kept)
        else:
            self._write([adapter], weight, bias)

    def unmerge(self, adapter: "Adapter") -> None:
        """Take an adapter out of the weight; with the last one the weight is bit for bit what it was."""
        if self.kept is None:
            raise ValueError(f"{adapter.name}: merged without a kept copy of the weight, so it cannot be taken out again")
        self.merged.remove(adapter)
        adapter.is_merged = False
        self._write(self.merged, *self.kept)
        if not self.merged:
            self.kept = None
        self._leave_if_empty()

    def check(self, adapter: "Adapter", keep: bool) -> None:
        """Raises `ValueError` for what cannot be merged.

        That is packed or computed weights, a bias that the layer has not, and a layer's adapters merged unalike.
        """
        weight = self.layer.weight
        if isinstance(weight, Tensor) and not any(
            weight is own for own in (*self.layer._parameters.values(), *self.layer._buffers.values())
        ):
            raise ValueError(
                f"{adapter.name}: its layer computes its weight (a parametrisation, weight or spectral norm); adapters can be attached to "
                "it, not merged"
            )
        is_floats = isinstance(weight, Tensor) and is_plain(weight) and not unpacks_itself(self.layer)
        if not is_floats or tuple(weight.shape) != adapter.shape.weight:
            raise ValueError(f"{adapter.name}: its layer holds a packed (quantised) weight; adapters can be attached to it, not merged")
        if getattr(self.layer, "bias", None) is None and adapter.delta_bias() is not None:
            raise ValueError(f"{adapter.name}: changes a bias, and its layer has none")
        if self.merged and (self.kept is not None) != keep:
            raise ValueError(f"{adapter.name}: the layer's other adapters were merged with keep={not keep}; merge all of a layer alike")

    # Weights

    def _values(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        return weight.data, None if bias is None else bias.data

    @torch.no_grad()
    def _write(self, adapters: list["Adapter"], weight: Tensor, bias: Tensor | None) -> None:
        """Weight and bias of the layer as the given ones with these adapters: summed in float32 or better, rounded once."""
        write_sum(self.layer.weight.data, weight, adapters)
        if bias is None:
            return
        shift, moved = _widened(bias), False
        for adapter in adapters:
            change = adapter.delta_bias()
            if change is not None:
                shift.add_(change.to(shift), alpha=adapter.multiplier)
                moved = True
        self.layer.bias.data.copy_(shift if moved else bias)

    def _leave_if_empty(self) -> None:
        if not self.attached and not self.merged and self.base_forward is None:
            self.layer.__dict__.pop(ATTRIBUTE, None)


def stack_of(layer: nn.Module) -> Stack:
    """The stack of a layer, made if it has none."""
    if ATTRIBUTE not in layer.__dict__:
        layer.__dict__[ATTRIBUTE] = Stack(layer)
    return layer.__dict__[ATTRIBUTE]


def attached_to(layer: nn.Module) -> list["Adapter"]:
    """The adapters that a layer's forward runs."""
    stack = layer.__dict__.get(ATTRIBUTE)
    return [] if stack is None else list(stack.attached)


def base_forward_of(layer: nn.Module) -> Callable[..., Tensor]:
    """The layer's own forward, past any adapters."""
    stack = layer.__dict__.get(ATTRIBUTE)
    return layer.forward if stack is None or stack.base_forward is None else stack.base_forward


def kept_weight_of(layer: nn.Module) -> Tensor | None:
    """The layer's weight before what is merged into it, where a copy is kept."""
    stack = layer.__dict__.get(ATTRIBUTE)
    return None if stack is None or stack.kept is None else stack.kept[0]


def check_merge(adapter: "Adapter", keep: bool) -> None:
    """Raises `ValueError` where `Stack.merge` would."""
    (adapter.layer.__dict__.get(ATTRIBUTE) or Stack(adapter.layer)).check(adapter, keep)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.itemsize < 4 else tensor.dtype, copy=True)
