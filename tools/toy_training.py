"""What the toy trainings share: a schedule, a resumable state file, timing."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


def warm_cosine(step: int, steps: int, warm_up: int) -> float:
    """The factor of the learning rate: a linear warm-up, then half a cosine down to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


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

    def note(self, loss: float) -> None:
        """Count one step and its loss."""
        self.loss += (loss - self.loss) * max(0.005, 1 / (self.step + 1))
        self.step += 1

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.monotonic() - self.started
