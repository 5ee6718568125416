"""Optimizers for tests: every name that runs on a CPU, and a short training of one weight."""

from typing import Any

import torch
from torch.optim import Optimizer

from library.training.optimizing.optimizer import OPTIMIZERS, OptimizerOptions, build_optimizer, finds_rate, optimizer_class

CPU_OPTIMIZERS = [name for name in OPTIMIZERS if not name.startswith("Paged")]
RATES = {"SGDNesterov": 1.0, "SGDNesterov8bit": 1.0, "SGDScheduleFree": 10.0, "DAdaptAdaGrad": 10.0}


def options_of(name: str, **others: Any) -> OptimizerOptions:
    """Options with a rate that suits the optimizer."""
    rate = RATES.get(name, 1.0 if finds_rate(optimizer_class(name)) else 1e-2)
    return OptimizerOptions(**{"optimizer_type": name, "learning_rate": rate, **others})


def trained(name: str, *weights: torch.nn.Parameter, steps: int, **others: Any) -> Optimizer:
    """The optimizer after some steps towards zero of all weights."""
    optimizer = build_optimizer([{"params": list(weights)}], options_of(name, **others), seed=3)
    descend(optimizer, *weights, steps=steps)
    return optimizer


def descend(optimizer: Optimizer, *weights: torch.nn.Parameter, steps: int) -> None:
    """Steps towards zero of all weights."""
    for _ in range(steps):
        torch.stack([weight.float().square().mean() for weight in weights]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
