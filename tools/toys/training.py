"""What the toy trainings share: a schedule, a resumable state file, timing."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Network = Any  # diffusers' and transformers' annotations of their own networks do not hold under a type checker


def warm_cosine(step: int, steps: int, warm_up: int) -> float:
    """The factor of the learning rate: a linear warm-up, then half a cosine down to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def warm_hold_fall(step: int, steps: int, warm_up: int, fall: int) -> float:
    """The factor of the learning rate: a linear warm-up, one for long, then half a cosine down to zero in the last `fall` steps.

    Until it falls the number of steps changes nothing, and may still be chosen.
    """
    left = max(0, steps - step)
    return min((step + 1) / warm_up, 1.0, 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / fall)))


@dataclass(kw_only=True, frozen=True)
class Course:
    """How long a part of a toy is trained, how fast, and how often that is shown and saved."""

    steps: int
    batch: int
    learning_rate: float
    warm_up: int
    seed: int
    log_every: int = 50
    save_every: int = 100


@dataclass(kw_only=True)
class Run:
    """A training that can be stopped and taken up again: its networks, optimizer, step and seconds so far."""

    path: Path
    networks: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # a running mean over about 200 steps
    started: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Take up the saved state where there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state.get("loss", 0.0)

    def save(self) -> None:
        """Write the state beside its place, then move it there."""
        state = {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.elapsed(),
            "loss": self.loss,
        }
        beside = self.path.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.path)

    def follow(self, course: Course, name: str, step: Callable[[int], float], judge: Callable[[], str]) -> None:
        """Take the steps that are left, each of which gives its loss; `judge` says how good the networks are whenever they are saved."""
        while self.step < course.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = course.learning_rate * warm_cosine(self.step, course.steps, course.warm_up)
            self.note(step(self.step))
            if self.step % course.log_every == 0:
                print(f"{name} step {self.step}/{course.steps} loss {self.loss:.4f} {self.elapsed():.0f} s", flush=True)
            if self.step % course.save_every == 0 or self.step == course.steps:
                self.save()
                print(f"{name} step {self.step} {judge()}", flush=True)

    def note(self, loss: float) -> None:
        """Count one step and its loss."""
        self.loss += (loss - self.loss) * max(0.005, 1 / (self.step + 1))
        self.step += 1

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.monotonic() - self.started


class Average(nn.Module):
    """An exponential moving average of a network's parameters."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.values = nn.ParameterList([nn.Parameter(p.detach().clone(), requires_grad=False) for p in network.parameters()])

    @torch.no_grad()
    def follow(self, network: nn.Module, step: int) -> None:
        """Move towards the network; faster in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([v.data for v in self.values], [p.data for p in network.parameters()], 1 - decay)

    @torch.no_grad()
    def put_into(self, network: nn.Module) -> None:
        """Copy the averages into the network."""
        for parameter, value in zip(network.parameters(), self.values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def standing_in(self, network: nn.Module) -> Iterator[None]:
        """Within: the network has the averages; after, its own weights again."""
        kept = [p.detach().clone() for p in network.parameters()]
        self.put_into(network)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), kept, strict=True):
                    parameter.copy_(value)


# ---------------------------------------------------------------- scratch files


def save_module(module: nn.Module, path: Path) -> None:
    """Write the weights of a network."""
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Read the weights of a network, which is then ready for use."""
    module.load_state_dict(load_file(path))
    module.eval()


def note(scratch: Path, part: str, report: dict[str, float]) -> None:
    """Write what a training measured, and print it."""
    (scratch / f"{part}_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="ascii")
    print(f"{part}: {report}", flush=True)


def save_configs(modules: dict[str, Network], scratch: Path) -> None:
    """Write each network's configuration beside its weights."""
    for name, module in modules.items():
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        (scratch / f"{name}.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="ascii")
