"""Learning-rate schedules: diffusers' by name, in optimizer steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.core.options import option

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass(kw_only=True, frozen=True)
class ScheduleOptions:
    """Learning-rate schedule."""

    lr_scheduler: Schedule = option("constant", help="shape of the learning rate over the run (diffusers' schedules)")
    lr_warmup_steps: int | float | str = option(0, help="warm-up: a number of steps, or a share of the run as 10% or 0.1")
    lr_scheduler_num_cycles: int = option(1, help="restarts of cosine_with_restarts")
    lr_scheduler_power: float = option(1.0, help="power of polynomial")

    def check(self) -> Iterable[str]:
        """What is wrong: a warm-up that is no number, options that the schedule does not read."""
        try:
            warmup_steps(self.lr_warmup_steps, 100)
        except ValueError as error:
            yield str(error)
        if self.lr_scheduler_num_cycles < 1:
            yield f"--lr_scheduler_num_cycles {self.lr_scheduler_num_cycles}: must be at least 1"
        if self.lr_scheduler_num_cycles != 1 and self.lr_scheduler != "cosine_with_restarts":
            yield f"--lr_scheduler_num_cycles has no effect with --lr_scheduler {self.lr_scheduler}; use cosine_with_restarts"
        if self.lr_scheduler_power != 1.0 and self.lr_scheduler != "polynomial":
            yield f"--lr_scheduler_power has no effect with --lr_scheduler {self.lr_scheduler}; use polynomial"


def warmup_steps(given: float | str, total: int) -> int:
    """Warm-up in optimizer steps: `100` is steps, `10%` and `0.1` are shares of `total`. Raises `ValueError`."""
    text = str(given)
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--lr_warmup_steps {text}: give steps (100) or a share of the run (10% or 0.1)") from None
    is_share = text.endswith("%") or (number < 1 and number != int(number))
    if number < 0 or (is_share and number > 1) or (not is_share and number != int(number)):
        raise ValueError(f"--lr_warmup_steps {text}: give whole steps, or a share between 0 and 1")
    return round(number * total) if is_share else int(number)


def build_schedule(optimizer: Optimizer, options: ScheduleOptions, total: int) -> LambdaLR:
    """The schedule over `total` optimizer steps; step it once after every optimizer step."""
    warmup = warmup_steps(options.lr_warmup_steps, total)
    name = "constant_with_warmup" if options.lr_scheduler == "constant" and warmup else options.lr_scheduler
    return get_scheduler(
        name,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        num_cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
    )
