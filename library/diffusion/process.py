"""Noise processes: how latents and noise are mixed at a timestep, and what the denoiser shall predict."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise import NoiseOptions


class NoiseProcess(ABC):
    """Pure functions of latents, noise and timesteps. Timesteps are (batch,), in the units that the denoiser takes."""

    noise_options: NoiseOptions
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
    def counted(self, timesteps: Tensor) -> Tensor:
        """The timesteps (batch,) float32 as counted from 0 to 1000, whatever the denoiser takes."""

    @abstractmethod
    def sigmas(self, timesteps: Tensor) -> Tensor:
        """How much noise there is for one part of picture (batch,) float32; infinite where no picture is left."""

    @abstractmethod
    def sampler(self, name: str, steps: int, shift: float | None = None) -> Any:
        """A scheduler with diffusers' interface that leads from noise to latents in `steps` steps.

        `shift` moves the steps of a flow towards the noise. Raises `ValueError` for a sampler or a shift that the process has not.
        """
