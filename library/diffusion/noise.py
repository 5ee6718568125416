"""What is mixed into latents: at which timesteps, and how the noise differs from plain normal numbers.

Every draw is one sample's own, from its own generator, so that no result depends on the batch around it. sd-scripts draws random
strengths and the sizes of a pyramid once for a batch, and divides a pyramid by the deviation of the whole batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from library.core.options import option
from library.core.rules import Rule

STEPS = 1000
"""Timesteps that diffusion models count; options name timesteps as parts of this many."""


@dataclass(kw_only=True, frozen=True)
class NoiseOptions:
    """Noise and timesteps.

    Timesteps are counted out of 1000 for every family.
    """

    min_timestep: int | None = option(None, help="draw no timestep below this one (0 to 999)")
    max_timestep: int | None = option(None, help="draw no timestep from this one on (1 to 1000)")
    noise_offset: float | None = option(
        None, help="add one normal number a channel, times this, to the noise: darker and brighter pictures"
    )
    noise_offset_random_strength: bool = option(False, help="multiply --noise_offset by a number drawn evenly from 0 to 1, for each sample")
    adaptive_noise_scale: float | None = option(
        None, help="add this times the size of a channel's mean latent to --noise_offset; the sum is never below 0"
    )
    multires_noise_iterations: int | None = option(
        None, help="add this many noises of ever lower resolution (6 to 10 are usual), then bring the sample's noise back to deviation 1"
    )
    multires_noise_discount: float = option(0.3, help="strength of each noise of --multires_noise_iterations as a part of the one before")
    ip_noise_gamma: float | None = option(
        None, help="strength of more noise in what the model sees and is not asked for (input perturbation; 0.1 is usual)"
    )
    ip_noise_gamma_random_strength: bool = option(False, help="multiply --ip_noise_gamma by a number drawn evenly from 0 to 1, each sample")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            option="noise_offset_random_strength",
            when=lambda v: v["noise_offset_random_strength"] and not v["noise_offset"],
            because="there is no --noise_offset whose strength it could draw",
        ),
        Rule(
            option="multires_noise_discount",
            when=lambda v: not v["multires_noise_iterations"],
            because="it is for --multires_noise_iterations",
        ),
        Rule(
            option="ip_noise_gamma_random_strength",
            when=lambda v: v["ip_noise_gamma_random_strength"] and not v["ip_noise_gamma"],
            because="there is no --ip_noise_gamma whose strength it could draw",
        ),
    )

    @property
    def bounds(self) -> tuple[int, int]:
        """The first timestep drawn, and the one after the last."""
        low, high = self.min_timestep, self.max_timestep
        return 0 if low is None else low, STEPS if high is None else high

    def check(self) -> Iterable[str]:
        """What is wrong: bounds without a timestep between them, strengths below 0, two ways to add low frequencies."""
        low, high = self.bounds
        if not 0 <= low < STEPS:
            yield f"--min_timestep {low}: must lie between 0 and {STEPS - 1}"
        elif not low < high <= STEPS:
            yield f"--max_timestep {high}: must lie between {low + 1} (above --min_timestep) and {STEPS}"
        for name in ("noise_offset", "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                yield f"--{name} {value:g}: must be a finite number, 0 or more"
        if self.adaptive_noise_scale is not None and not math.isfinite(self.adaptive_noise_scale):
            yield f"--adaptive_noise_scale {self.adaptive_noise_scale:g}: must be finite"
        if self.adaptive_noise_scale and self.noise_offset is None:
            yield "--adaptive_noise_scale: changes --noise_offset, which is not given; give it too, if only --noise_offset 0"
        if self.multires_noise_iterations and self.offsets:
            yield "--noise_offset and --multires_noise_iterations: both add low frequencies to the noise; give one of them"

    @property
    def offsets(self) -> bool:
        """Is an offset added to the noise?"""
        return bool(self.noise_offset or self.adaptive_noise_scale)


def shaped(noise: Tensor, latents: Tensor, options: NoiseOptions, generator: torch.Generator) -> Tensor:
    """The noise of one sample (channels, height, width) as the options shape it, on the CPU; `latents` are those it is mixed into.

    The model learns to tell this noise from the picture. Plain noise comes back as it is, and draws nothing.
    """
    if options.offsets:
        noise = noise + _offset(latents, options, generator)
    if options.multires_noise_iterations:
        noise = _pyramid(noise, options.multires_noise_iterations, options.multires_noise_discount, generator)
        noise = noise / noise.std()
    return noise


def perturbed(noise: Tensor, options: NoiseOptions, generator: torch.Generator) -> Tensor:
    """The noise that one sample's input is mixed with: `--ip_noise_gamma` times more on top (Ning et al. 2023, "Input Perturbation
    Reduces Exposure Bias in Diffusion Models", algorithm 1)."""
    if not options.ip_noise_gamma:
        return noise
    gamma = options.ip_noise_gamma * _strength(options.ip_noise_gamma_random_strength, generator)
    return noise + gamma * torch.randn(noise.shape, generator=generator)


# The parts


def _offset(latents: Tensor, options: NoiseOptions, generator: torch.Generator) -> Tensor:
    """(channels, 1, 1): a normal number a channel, times the offset's strength there."""
    strength = (options.noise_offset or 0.0) * _strength(options.noise_offset_random_strength, generator)
    if options.adaptive_noise_scale:
        size = latents.float().mean((1, 2)).abs().cpu().view(-1, 1, 1)
        strength = (strength + options.adaptive_noise_scale * size).clamp(min=0)
    return strength * torch.randn(latents.shape[0], 1, 1, generator=generator)


def _pyramid(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """The noise plus normal noises made smaller by a random factor of 2 to 4 a level, each drawn up to its size (Whitaker 2023)."""
    height, width = noise.shape[-2:]
    for level in range(iterations):
        factor = float(2 + 2 * torch.rand((), generator=generator)) ** level
        size = max(1, int(height / factor)), max(1, int(width / factor))
        small = torch.randn(1, noise.shape[0], *size, generator=generator)
        large = small if size == (height, width) else F.interpolate(small, (height, width), mode="bilinear")
        noise = torch.add(noise, large[0], alpha=discount**level)
        if 1 in size:
            break
    return noise


def _strength(is_random: bool, generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator)) if is_random else 1.0
