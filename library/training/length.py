"""How long a run is: in optimizer steps, in epochs, and which step a batch belongs to."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from library.core.options import option
from library.data.dataset import TrainingData
from library.data.views import Clock


@dataclass(kw_only=True, frozen=True)
class RunOptions:
    """Run."""

    max_train_steps: int = option(1600, help="length of the run in optimizer steps, where --max_train_epochs is absent")
    max_train_epochs: int | None = option(None, help="length of the run in epochs; wins over --max_train_steps")
    gradient_accumulation_steps: int = option(1, help="batches whose gradients are averaged for one optimizer step")
    seed: int | None = option(None, help="seed of everything random; drawn and logged where absent")

    def check(self) -> Iterable[str]:
        """What is wrong: lengths below one, a seed that no generator takes."""
        for name in ("max_train_steps", "max_train_epochs", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed}: must lie between 0 and 2^63 - 1"


@dataclass(kw_only=True, frozen=True)
class Length:
    """How long a run is. An epoch's last optimizer step may average fewer batches."""

    steps_per_epoch: int
    steps: int
    more_epochs: int = 0  # than the steps take from the start; below 0 for fewer

    @property
    def epochs(self) -> int:
        """The epoch of the last step, counted from 1."""
        return math.ceil(self.steps / self.steps_per_epoch) + self.more_epochs

    def seen_from(self, step: int, epoch: int, made: int) -> "Length":
        """The same for a run after `step` steps, `made` of them in this epoch: those before it may have had other numbers of steps.

        So it is where a run goes on with another number of processes, for example.
        """
        left = math.ceil((self.steps - step + made) / self.steps_per_epoch)
        return replace(self, more_epochs=epoch - 1 + left - math.ceil(self.steps / self.steps_per_epoch))

    @classmethod
    def of(cls, options: RunOptions, batches_per_epoch: int) -> "Length":
        """The length that the options and the number of batches an epoch (on this rank) give."""
        steps_per_epoch = math.ceil(batches_per_epoch / options.gradient_accumulation_steps)
        epochs = options.max_train_epochs
        return cls(steps_per_epoch=steps_per_epoch, steps=options.max_train_steps if epochs is None else epochs * steps_per_epoch)


def settle_length(options: RunOptions, data: TrainingData, world: int) -> Length:
    """How long the run is on `world` ranks; the data is told, for what its captions do in the course of it."""
    length = Length.of(options, data.batches_per_epoch(world))
    batches_per_step = world * options.gradient_accumulation_steps
    data.set_clock(Clock(steps=length.steps, steps_per_epoch=length.steps_per_epoch, batches_per_step=batches_per_step))
    return length
