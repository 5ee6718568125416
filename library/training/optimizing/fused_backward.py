"""The fused backward pass: each weight is stepped as soon as its gradient is there, so that gradients never exist all at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.core.log import get_logger
from library.training.optimizing.averaging import real_parameter, stepped

logger = get_logger(__name__)

PROBE_STEPS = 10


class GradientFaults:
    """Takes gradients that are not finite for zero, and knows whether there were any. The device is asked once a step."""

    def __init__(self) -> None:
        self._any: Tensor | None = None

    def mend(self, gradient: Tensor) -> None:
        """Make a gradient zero where any of it is not finite."""
        faulty = ~gradient.isfinite().all()
        gradient.masked_fill_(faulty, 0)
        self._any = faulty if self._any is None else self._any | faulty

    def take(self) -> bool:
        """Was any gradient not finite since this was asked last?"""
        found, self._any = self._any is not None and bool(self._any), None
        return found


def fuse_backward(optimizer: Optimizer, max_norm: float) -> GradientFaults:
    """From now on the backward pass steps the parameters of `optimizer`, one by one, and frees their gradients.

    `max_norm` clips each gradient by its own norm, 0 not at all. Returns what tells of gradients that are not finite.
    """
    faults = GradientFaults()
    optimizer = stepped(optimizer)
    if max_norm > 0:
        logger.warning(
            "--fused_backward_pass: the norm of all gradients is never known, so --max_grad_norm %g acts on each tensor alone; "
            "--max_grad_norm 0 turns it off", max_norm,
        )  # fmt: skip
    for place, group in enumerate(optimizer.param_groups):
        for member in group["params"]:
            real_parameter(optimizer, member).register_post_accumulate_grad_hook(
                partial(_step_one, optimizer, place, member, max_norm, faults)
            )
    return faults


def steps_each_alone(make: Callable[[list[dict[str, Any]]], Optimizer]) -> bool:
    """Whether stepping weights one after the other is what stepping them together is, found out by doing both on two small ones."""
    together, alone = _probe(make, one_by_one=False), _probe(make, one_by_one=True)
    return all(torch.allclose(first, second, rtol=1e-4, atol=0) for first, second in zip(together, alone, strict=True))


def _step_one(optimizer: Optimizer, place: int, member: nn.Parameter, max_norm: float, faults: GradientFaults, real: Tensor) -> None:
    assert real.grad is not None, "it is called once the gradient is there"
    faults.mend(real.grad)
    if max_norm > 0:
        torch.nn.utils.clip_grad_norm_([real], max_norm)
    with _only(optimizer, place, member):
        optimizer.step()
    real.grad = None


@contextmanager
def _only(optimizer: Optimizer, place: int, member: nn.Parameter) -> Iterator[None]:
    """The optimizer with one parameter in one group."""
    groups = optimizer.param_groups
    group, members = groups[place], groups[place]["params"]
    optimizer.param_groups, group["params"] = [group], [member]
    try:
        yield
    finally:
        optimizer.param_groups, group["params"] = groups, members


def _probe(make: Callable[[list[dict[str, Any]]], Optimizer], *, one_by_one: bool) -> list[Tensor]:
    weights = [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))]  # from zero, so that the smallest step shows
    optimizer = make([{"params": weights}])
    for step in range(PROBE_STEPS):
        for place, weight in enumerate(weights):
            weight.grad = torch.linspace(0.1, 1 + 3 * place, 16).reshape(4, 4) + 0.1 * step
        if one_by_one:
            for weight in weights:
                with _only(optimizer, 0, weight):
                    optimizer.step()
        else:
            optimizer.step()
    return [weight.detach() for weight in weights]
