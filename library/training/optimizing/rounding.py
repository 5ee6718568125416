"""Stochastic rounding: weights in bfloat16 whose small steps are not lost.

A bfloat16 number has 8 bits of mantissa, so a step below 1/256 of a weight rounds to nothing. Rounded up or down at random, with
probabilities by distance, the expected weight is the exact one (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision").
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.core.keyed_random import keyed_seed

LOW_BITS = 16
"""What float32 has more than bfloat16, at the end of the same layout."""

ALIGNMENT = 4
"""Every copy begins at a multiple of so many numbers (16 bytes), for kernels that read several at once."""

CHUNK = 1 << 22
"""Numbers that are rounded at a time: noise for all of them at once would take as much memory as the copies."""


class StochasticRounding(Optimizer):
    """Any optimizer over parameters of which some are bfloat16: it sees float32 copies, and its states are float32.

    The copies live for the length of a step. The noise is a function of the seed and the number of the step, so that a resumed run
    repeats it, and every rank rounds alike. `param_groups` are the optimizer's own, with stand-ins in the place of bfloat16 parameters.
    """

    def __init__(self, make: Callable[[list[dict[str, Any]]], Optimizer], groups: list[dict[str, Any]], seed: int) -> None:
        # Not super().__init__(): groups, states and hooks are those of the optimizer within, as in accelerate's own wrapper.
        self._seed, self._steps = seed, 0
        self._real: dict[nn.Parameter, nn.Parameter] = {}  # stand-in -> bfloat16 parameter
        own = [{**group, "params": [self._stand_in(parameter) for parameter in group["params"]]} for group in groups]
        self._show(list(self._real))
        self.optimizer = make(own)  # constructors may look at shapes
        self._hide(list(self._real))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The groups of the optimizer within."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The states of the optimizer within, by stand-in."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The defaults of the optimizer within."""
        return self.optimizer.defaults

    def real(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter that a member of `param_groups` stands for."""
        return self._real.get(parameter, parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient. Raises `ValueError` for a closure, which nothing here gives."""
        if closure is not None:
            raise ValueError("bfloat16 weights are stepped without a closure")
        shown = [member for member in self._members() if self._real[member].grad is not None]
        copies = self._show(shown)
        self._show_gradients(shown)
        result = self.optimizer.step()
        for stand_in in shown:
            stand_in.grad = None
        for place, copy in enumerate(copies):
            copy.round(partial(self._noise, copy.flat.device, place))
        self._take(copies)
        self._steps += 1
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free (or zero) the gradients of the parameters themselves."""
        for group in self.param_groups:
            for parameter in map(self.real, group["params"]):
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer within, and how often it stepped."""
        return {**self.optimizer.state_dict(), "rounded_steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state; float32 states stay float32. A state without `rounded_steps` (of a float32 run) begins to count at 0."""
        rest = dict(state_dict)
        self._steps = rest.pop("rounded_steps", 0)
        self._hide(list(self._real))  # on the device where the parameters are now
        self.optimizer.load_state_dict(rest)

    @contextmanager
    def shown(self) -> Iterator[Optimizer]:
        """The optimizer within, its parameters float32 for the while; what it changed is rounded to nearest."""
        with torch.no_grad():
            copies = self._show(self._members())
            yield self.optimizer
            self._take(copies)

    # Stand-ins

    def _stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype != torch.bfloat16:
            return parameter
        stand_in = nn.Parameter(torch.empty(0, device=parameter.device))
        self._real[stand_in] = parameter
        return stand_in

    def _members(self) -> list[nn.Parameter]:
        return [member for group in self.param_groups for member in group["params"] if member in self._real]

    def _show(self, stand_ins: list[nn.Parameter]) -> list["_Copies"]:
        """Give stand-ins the values of their parameters; returns the copies, device by device."""
        copies = []
        for members in self._by_device(stand_ins):
            copy = _Copies.of(members, [self._real[member].detach() for member in members])
            for member, view in zip(members, copy.views, strict=True):
                member.data = view
            copies.append(copy)
        return copies

    def _show_gradients(self, stand_ins: list[nn.Parameter]) -> None:
        for members in self._by_device(stand_ins):
            gradients = [gradient for member in members if (gradient := self._real[member].grad) is not None]
            for member, view in zip(members, _Copies.of(members, gradients).views, strict=True):
                member.grad = view

    def _take(self, copies: list["_Copies"]) -> None:
        """Give the parameters the values of their stand-ins, which are empty again."""
        for copy in copies:
            torch._foreach_copy_([self._real[member].detach() for member in copy.members], [member.data for member in copy.members])
            self._hide(copy.members)

    def _hide(self, stand_ins: list[nn.Parameter]) -> None:
        for stand_in in stand_ins:
            stand_in.data = torch.empty(0, device=self._real[stand_in].device)

    def _by_device(self, stand_ins: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        found: dict[torch.device, list[nn.Parameter]] = {}
        for stand_in in stand_ins:
            found.setdefault(self._real[stand_in].device, []).append(stand_in)
        return list(found.values())

    def _noise(self, device: torch.device, place: int, chunk: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(keyed_seed(self._seed, "rounding", self._steps, place, chunk))


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """Float32 copies of tensors on one device, one after the other: a network has thousands, and each kernel takes its time to start."""

    members: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]

    @classmethod
    def of(cls, members: list[nn.Parameter], tensors: list[Tensor]) -> "_Copies":
        lengths = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        flat = torch.zeros(sum(lengths), device=tensors[0].device)
        views = [part[: tensor.numel()].view(tensor.shape) for part, tensor in zip(flat.split(lengths), tensors, strict=True)]
        torch._foreach_copy_(views, tensors)
        return cls(members=members, flat=flat, views=views)

    def round(self, noise: Callable[[int], torch.Generator]) -> None:
        """Round what the members hold; `noise` gives the generator of a chunk."""
        for member, view in zip(self.members, self.views, strict=True):
            if member.untyped_storage()._cdata != view.untyped_storage()._cdata:  # an optimizer that does not work in place
                view.copy_(member.data)
                member.data = view
        for number, chunk in enumerate(self.flat.split(CHUNK)):
            chunk.copy_(rounded_stochastically(chunk, noise(number)))


def rounded_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 values as bfloat16 of the same shape: one of the two neighbours, so that the mean is the value itself.

    Values that bfloat16 has are kept, as are infinities and NaN. `generator` is of the device of `values`.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << LOW_BITS, bits.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = ((bits + noise) & -(1 << LOW_BITS)).view(torch.float32)  # a carry into the upper half is the step to the next neighbour
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
