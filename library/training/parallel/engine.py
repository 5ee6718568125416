"""What differs from engine to engine in a training step: how the model is prepared, and how gradients go from rank to rank.

This is the engine of one process and of accelerate's DDP; `fsdp.py` and `zero.py` hold those that share out weights.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from library.core.command_line import OptionSet
from library.data.dataset import TrainingData
from library.models.architecture import Architecture
from library.training.model import TrainingModel


class Engine:
    """One process, or several that hold everything and exchange gradients."""

    shares_base = False  # whether a rank holds a part of the base's weights only
    loads_on_cpu = False  # whether the denoiser waits in main memory until it is prepared

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def refusals(self, arch: Architecture, options: OptionSet) -> Iterator[str]:
        """What this engine cannot do of what the options ask for, one sentence each."""
        yield from ()

    def data_refusals(self, data: TrainingData) -> Iterator[str]:
        """What it cannot do with the data."""
        yield from ()

    def prepare(self, arch: Architecture, model: TrainingModel, optimizer: Optimizer, *, is_placed: bool) -> tuple[nn.Module, Optimizer]:
        """Model and optimizer, ready for this device and all ranks; a model that `is_placed` is moved nowhere."""
        return self.accelerator.prepare(model, optimizer, device_placement=[not is_placed, True])

    def synchronised(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a batch: gradients go from rank to rank with the last one of a step only."""
        return nullcontext() if is_last else self.accelerator.no_sync(model)

    def backward(self, model: nn.Module, loss: Tensor, *, is_last: bool) -> None:
        """The gradients of a loss, added to those there are."""
        self.accelerator.backward(loss)

    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every rank the mean of all ranks' gradients, where the backward pass has not; after the last one of a step."""

    def clip(self, model: nn.Module, parameters: Sequence[nn.Parameter], limit: float) -> float | None:
        """Scale the gradients down to a norm (0: not at all); returns the norm before it, None where it is not known yet."""
        norm = self.accelerator.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
        return None if norm is None else float(norm)

    def step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        """Update the weights; returns the norm of the gradients where `clip` could not."""
        optimizer.step()
        return None

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Within it this rank has all of the network's weights, to save them; every rank enters and leaves."""
        yield

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Within it this rank has all weights, and computes without the others; every rank enters and leaves."""
        yield

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of the optimizer, the same on all ranks; every rank calls it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take over what `optimizer_state` gave; every rank calls it with the same."""
        optimizer.load_state_dict(state)
