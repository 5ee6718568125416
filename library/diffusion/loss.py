"""The training loss: how the error of a guess is measured and weighed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from library.core.options import option
from library.core.rules import Rule
from library.diffusion.noise import STEPS
from library.diffusion.process import NoiseProcess

ROBUST = ("huber", "smooth_l1")  # squared for small errors, absolute for large ones


def _needs_robust(values: dict[str, Any]) -> bool:
    return values["loss_type"] not in ROBUST


@dataclass(kw_only=True, frozen=True)
class LossOptions:
    """Loss."""

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = option(
        "l2", help="error of the guess: l2 squared, l1 absolute, huber and smooth_l1 squared below a threshold and absolute above"
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", help="threshold of huber and smooth_l1 over the timesteps: constant, exponential (falls with t), snr (falls with the noise)"
    )
    huber_c: float = option(0.1, help="threshold itself for constant; what it falls to at the last timestep for exponential and snr")
    huber_scale: float = option(1.0, help="factor of the threshold, for --huber_schedule constant and exponential")

    RULES: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(option=name, when=_needs_robust, because="it is for --loss_type huber and smooth_l1")
            for name in ("huber_schedule", "huber_c", "huber_scale")
        ),
        Rule(
            option="huber_scale",
            when=lambda v: not _needs_robust(v) and v["huber_schedule"] == "snr",
            because="--huber_schedule snr does not read it, as in sd-scripts; use --huber_c, or another schedule",
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: thresholds that are not positive or not finite."""
        for name in ("huber_c", "huber_scale"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                yield f"--{name} {value:g}: must be a finite number above 0"


def weigh(
    guess: Tensor, target: Tensor, weights: Tensor, options: LossOptions, mask: Tensor | None = None, *, thresholds: Tensor | None = None
) -> Tensor:
    """The losses of samples (batch,): mean error of each in fp32, times its weight (batch,). The loss of the batch is their mean.

    `mask` (batch, 1, height, width), 0 to 1, says how much each place counts. A mean is still over all places, as in sd-scripts: a
    sample that shows little has a small loss, not one in which its few places weigh more. `thresholds` (batch,) from `huber_thresholds`
    are what huber and smooth_l1 need.
    """
    error = _errors(guess.float(), target.float(), options.loss_type, thresholds)
    if mask is not None:
        error = error * mask
    return error.flatten(1).mean(1) * weights


def huber_thresholds(process: NoiseProcess, timesteps: Tensor, options: LossOptions) -> Tensor | None:
    """The thresholds c (batch,) float32 of huber and smooth_l1 at these timesteps; None for other losses.

    With t from 0 to 1000, noise sigma per part of picture, and the options' c: exponential exp(t ln(c) / 1000) x scale; snr
    (1 - c) / (1 + sigma)^2 + c; constant c x scale. All are positive and finite, also where no picture is left.
    """
    if options.loss_type not in ROBUST:
        return None
    if options.huber_schedule == "exponential":
        return torch.exp(process.counted(timesteps) * math.log(options.huber_c) / STEPS) * options.huber_scale
    if options.huber_schedule == "snr":
        return (1 - options.huber_c) / (1 + process.sigmas(timesteps)) ** 2 + options.huber_c
    return torch.full_like(timesteps, options.huber_c * options.huber_scale, dtype=torch.float32)


def _errors(guess: Tensor, target: Tensor, loss_type: str, thresholds: Tensor | None) -> Tensor:
    """The error of every number: d^2, |d|, huber 2c (sqrt(d^2 + c^2) - c) or smooth_l1 2 (sqrt(d^2 + c^2) - c)."""
    if loss_type not in ROBUST:
        return {"l2": F.mse_loss, "l1": F.l1_loss}[loss_type](guess, target, reduction="none")
    assert thresholds is not None, "huber and smooth_l1 need their thresholds"
    c = thresholds.to(guess.device).view(-1, *[1] * (guess.dim() - 1))
    squared = (guess - target) ** 2
    smooth = 2 * squared / ((squared + c**2).sqrt() + c)  # the same without the difference of two near numbers
    return smooth * c if loss_type == "huber" else smooth
