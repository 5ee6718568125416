"""The training loss: how the error of a guess is measured and weighed."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from library.core.options import option


@dataclass(kw_only=True, frozen=True)
class LossOptions:
    """Loss."""

    loss_type: Literal["l2", "l1"] = option("l2", help="error of the guess: l2 squared, l1 absolute")


MEASURES = {"l2": F.mse_loss, "l1": F.l1_loss}


def weigh(guess: Tensor, target: Tensor, weights: Tensor, options: LossOptions, mask: Tensor | None = None) -> Tensor:
    """The loss of a batch, a scalar: mean error of each sample in fp32, times its weight (batch,), then the mean.

    `mask` (batch, 1, height, width), 0 to 1, says how much each place counts. The mean is still over all places, as in sd-scripts: a
    sample that shows little has a small loss, not one in which its few places weigh more.
    """
    error = MEASURES[options.loss_type](guess.float(), target.float(), reduction="none")
    if mask is not None:
        error = error * mask
    return (error.flatten(1).mean(1) * weights).mean()
