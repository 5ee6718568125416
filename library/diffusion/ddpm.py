"""Variance-preserving diffusion on 1000 noise levels: its options, targets and loss weights.

The formulas name SNR(t) = a(t) / (1 - a(t)), where a(t) is the cumulative product of 1 - beta up to t.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.core.options import option
from library.core.rules import Rule
from library.diffusion.noise import STEPS, NoiseOptions
from library.diffusion.process import NoiseProcess

HIGHEST_SNR = 1000.0  # that scale_v_pred_loss_like_noise_pred, v_pred_like_loss and debiased_estimation_loss count with, as in sd-scripts


@dataclass(kw_only=True, frozen=True)
class PredictionOptions:
    """What a denoiser was made to predict, a fact of its checkpoint; a family's `ModelOptions` inherit it."""

    v_parameterization: bool = option(False, help="the model predicts velocity (v-prediction) and not noise")
    zero_terminal_snr: bool = option(
        False, help="the model's last timestep is pure noise (zero terminal SNR); for models made with --v_parameterization"
    )

    def prediction_problems(self) -> Iterable[str]:
        """What is wrong: no picture left at the end for a model that predicts noise."""
        if self.zero_terminal_snr and not self.v_parameterization:
            yield (
                "--zero_terminal_snr: needs a model that predicts velocity (--v_parameterization): at the last timestep the input is the "
                "noise, so a model that predicts noise learns nothing there, and no sampler could begin"
            )


@dataclass(kw_only=True, frozen=True)
class DDPMOptions(NoiseOptions):
    """Noise and timesteps.

    And how much each timestep counts; all weights may be combined, and are then multiplied.
    """

    min_snr_gamma: float | None = option(
        None, help="weigh the loss by min(SNR, this) / SNR, or / (SNR + 1) with v-prediction (Hang et al. 2023; 5 is usual)"
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, help="weigh the loss of v-prediction by SNR / (SNR + 1): timesteps then count as noise prediction has them count"
    )
    v_pred_like_loss: float | None = option(None, help="add this times the loss that v-prediction would have to that of noise prediction")
    debiased_estimation_loss: bool = option(
        False, help="weigh the loss by 1 / sqrt(SNR), or by 1 / (SNR + 1) with v-prediction (Yu et al. 2023)"
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        *NoiseOptions.RULES,
        Rule(
            option="scale_v_pred_loss_like_noise_pred",
            when=lambda v: v["scale_v_pred_loss_like_noise_pred"] and not v.get("v_parameterization"),
            because="the model predicts noise; it is for --v_parameterization",
        ),
        Rule(
            option="v_pred_like_loss",
            when=lambda v: v.get("v_parameterization"),
            because="with --v_parameterization the loss is that of v-prediction already",
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: weights that are negative or infinite."""
        yield from super().check()
        for name in ("min_snr_gamma", "v_pred_like_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                yield f"--{name} {value:g}: must be a finite number, 0 or more; 0 turns it off"


class DDPMProcess(NoiseProcess):
    """Diffusion of Ho et al. 2020 (equation 4) on SD's scaled-linear betas, with prediction of noise (equation 14) or velocity.

    Velocity is that of Salimans & Ho 2022 (appendix D). With zero terminal SNR the betas are rescaled (Lin et al. 2024, algorithm 1), for
    noising, weights and sampling alike; sd-scripts takes its weights from the betas before that.
    """

    preview_sampler = "ddim"

    def __init__(
        self,
        options: DDPMOptions | None = None,
        prediction: PredictionOptions | None = None,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
    ) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # two seconds, which adapters alone need not wait for

        self.noise_options = self.options = options or DDPMOptions()
        self.prediction = prediction or PredictionOptions()
        self.prediction_type = "v" if self.prediction.v_parameterization else "epsilon"
        self.scheduler = DDPMScheduler(
            num_train_timesteps=STEPS, beta_start=beta_start, beta_end=beta_end, beta_schedule="scaled_linear", clip_sample=False,
            rescale_betas_zero_snr=self.prediction.zero_terminal_snr,
        )  # fmt: skip
        kept = self.scheduler.alphas_cumprod.double()
        self._snr = (kept / (1 - kept)).float()

    def timesteps(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randint(*self.options.bounds, (shape[0],), generator=generator)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps.long())  # pyright: ignore[reportArgumentType]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction.v_parameterization:
            return self.scheduler.get_velocity(latents, noise, timesteps.long())  # pyright: ignore[reportArgumentType]
        return noise

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """The product of all weights that the options ask for; each factor is one sample's, so their order changes nothing.

        At a last timestep of zero SNR, min-SNR and `scale_v_pred_loss_like_noise_pred` give 0 and the debiased weight gives 1.
        """
        options, is_velocity = self.options, self.prediction.v_parameterization
        weights, snr = torch.ones_like(timesteps, dtype=torch.float32), self._snr_at(timesteps)
        capped = snr.clamp(max=HIGHEST_SNR)
        if options.min_snr_gamma:
            weights *= snr.clamp(max=options.min_snr_gamma) / (snr + 1 if is_velocity else snr)
        if options.scale_v_pred_loss_like_noise_pred and is_velocity:
            weights *= capped / (capped + 1)
        if options.v_pred_like_loss and not is_velocity:
            weights *= 1 + options.v_pred_like_loss * (capped + 1) / capped
        if options.debiased_estimation_loss:
            weights *= 1 / (capped + 1) if is_velocity else capped.rsqrt()
        return weights

    def counted(self, timesteps: Tensor) -> Tensor:
        return timesteps.float()

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Infinite at a last timestep of zero SNR."""
        return self._snr_at(timesteps).rsqrt()

    def sampler(self, name: str, steps: int, shift: float | None = None) -> Any:
        from library.diffusion.samplers import build_sampler

        if shift is not None:
            predicts = "velocity" if self.prediction.v_parameterization else "noise"
            raise ValueError(f"flow shift {shift:g}: this model predicts {predicts} and has no flow to shift; leave it out")
        return build_sampler(name, steps, self.prediction)

    def _snr_at(self, timesteps: Tensor) -> Tensor:
        self._snr = self._snr.to(timesteps.device)
        return self._snr[timesteps.long()]
