"""What stands between a run and the optimizer it named: wrappers, and the two sets of weights of schedule-free ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from library.training.optimizing.rounding import StochasticRounding


def stepped(optimizer: Optimizer) -> Optimizer:
    """The optimizer without accelerate's wrapper; bfloat16 rounding stays."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that the user named, without any wrapper."""
    optimizer = stepped(optimizer)
    return optimizer.optimizer if isinstance(optimizer, StochasticRounding) else optimizer


def real_parameter(optimizer: Optimizer, parameter: nn.Parameter) -> nn.Parameter:
    """The network's parameter that a member of `optimizer.param_groups` is or stands for."""
    optimizer = stepped(optimizer)
    return optimizer.real(parameter) if isinstance(optimizer, StochasticRounding) else parameter


def is_schedule_free(kind: type[Optimizer]) -> bool:
    """Whether an optimizer trains one set of weights and averages another (Defazio et al. 2024, "The Road Less Scheduled")."""
    return callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Within it, the network has the averaged weights of a schedule-free optimizer; afterwards its own again, bit for bit.

    Around saving, previews and validation. Nothing happens for other optimizers.
    """
    if not is_schedule_free(type(innermost(optimizer))):
        yield
        return
    parameters = [real_parameter(optimizer, member) for group in stepped(optimizer).param_groups for member in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    _turn(optimizer, "eval")
    try:
        yield
    finally:
        _turn(optimizer, "train")
        with torch.no_grad():
            for parameter, own in zip(parameters, kept, strict=True):
                parameter.copy_(own)


def _turn(optimizer: Optimizer, way: str) -> None:
    outer = stepped(optimizer)
    if isinstance(outer, StochasticRounding):
        with outer.shown() as inner:
            _call(inner, way)
    else:
        _call(outer, way)


def _call(optimizer: Any, way: str) -> None:
    getattr(optimizer, way)()
