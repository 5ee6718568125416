"""Noise processes: how latents and noise are mixed at a timestep, and what the denoiser shall predict."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class NoiseProcess(ABC):
    """Pure functions of latents, noise and timesteps. Timesteps are (batch,)."""

    prediction_type: str  # modelspec.prediction_type: epsilon, v, ...

    @abstractmethod
    def timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random timesteps (batch,) drawn on the CPU from `generator`."""

    @abstractmethod
    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents that the denoiser sees."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser shall answer."""


class DDPMProcess(NoiseProcess):
    """Variance-preserving diffusion with noise prediction (Ho et al. 2020, equations 4 and 14) on SD's scaled-linear betas."""

    prediction_type = "epsilon"

    def __init__(self, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # two seconds, which adapters alone need not wait for

        self.scheduler = DDPMScheduler(
            num_train_timesteps=steps, beta_start=beta_start, beta_end=beta_end, beta_schedule="scaled_linear", clip_sample=False
        )
        self.steps = steps

    def timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.steps, (batch,), generator=generator)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps.long())  # pyright: ignore[reportArgumentType]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise
