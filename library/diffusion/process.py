"""Noise processes: how latents and noise are mixed at a timestep, and what the denoiser shall predict."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.core.options import option

STEPS = 1000
"""Timesteps that diffusion models count; options name timesteps as parts of this many."""


@dataclass(kw_only=True, frozen=True)
class TimestepRange:
    """Timesteps.

    Those that training draws, out of 0 to 1000.
    """

    min_timestep: int | None = option(None, help="draw no timestep below this one (0 to 999)")
    max_timestep: int | None = option(None, help="draw no timestep from this one on (1 to 1000)")

    @property
    def bounds(self) -> tuple[int, int]:
        """The first timestep drawn, and the one after the last."""
        low, high = self.min_timestep, self.max_timestep
        return 0 if low is None else low, STEPS if high is None else high

    def check(self) -> Iterable[str]:
        """What is wrong: bounds outside of the timesteps there are, or without one between them."""
        low, high = self.bounds
        if not 0 <= low < STEPS:
            yield f"--min_timestep {low}: must lie between 0 and {STEPS - 1}"
        elif not low < high <= STEPS:
            yield f"--max_timestep {high}: must lie between {low + 1} (above --min_timestep) and {STEPS}"


class NoiseProcess(ABC):
    """Pure functions of latents, noise and timesteps. Timesteps are (batch,), in the units that the denoiser takes."""

    prediction_type: str  # modelspec.prediction_type: epsilon, v, ...
    preview_sampler: str  # that training draws its previews with
    preview_shift: float | None = None  # of those previews, for a flow

    @abstractmethod
    def timesteps(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Random timesteps (batch,) for latents of `shape` (batch, channels, height, width), drawn on the CPU from `generator`."""

    @abstractmethod
    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents that the denoiser sees."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser shall answer."""

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """The weights (batch,) of samples at these timesteps; 1 unless the process weighs them."""
        return torch.ones_like(timesteps, dtype=torch.float32)

    @abstractmethod
    def sampler(self, name: str, steps: int, shift: float | None = None) -> Any:
        """A scheduler with diffusers' interface that leads from noise to latents in `steps` steps.

        `shift` moves the steps of a flow towards the noise. Raises `ValueError` for a sampler or a shift that the process has not.
        """


class DDPMProcess(NoiseProcess):
    """Variance-preserving diffusion with noise prediction (Ho et al. 2020, equations 4 and 14) on SD's scaled-linear betas."""

    prediction_type = "epsilon"
    preview_sampler = "ddim"

    def __init__(self, options: TimestepRange | None = None, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # two seconds, which adapters alone need not wait for

        self.scheduler = DDPMScheduler(
            num_train_timesteps=STEPS, beta_start=beta_start, beta_end=beta_end, beta_schedule="scaled_linear", clip_sample=False
        )
        self.bounds = (options or TimestepRange()).bounds

    def timesteps(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randint(*self.bounds, (shape[0],), generator=generator)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps.long())  # pyright: ignore[reportArgumentType]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def sampler(self, name: str, steps: int, shift: float | None = None) -> Any:
        from library.diffusion.samplers import build_sampler

        if shift is not None:
            raise ValueError(f"flow shift {shift:g}: this model predicts noise and has no flow to shift; leave it out")
        return build_sampler(name, steps)
