"""REX, a learning-rate schedule for runs of a known length."""

from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rex_schedule(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, min_lr_ratio: float = 0.0, last_epoch: int = -1
) -> LambdaLR:
    """A linear warm-up, then REX down to `min_lr_ratio` of the rate at the last step (see `rex`)."""
    factor = partial(_factor, warmup=num_warmup_steps, total=num_training_steps, floor=min_lr_ratio)
    return LambdaLR(optimizer, factor, last_epoch)


def rex(z: float) -> float:
    """The share of the rate after the share `z` of the run: (1 - z) / (1/2 + 1/2 (1 - z)).

    Chen et al. 2021, "REX: Revisiting Budgeted Training with an Improved Schedule". It stays high for longer than linear, then falls fast.
    """
    return (1 - z) / (0.5 + 0.5 * (1 - z))


def _factor(step: int, *, warmup: int, total: int, floor: float) -> float:
    if step < warmup:
        return step / warmup
    z = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * rex(z)
