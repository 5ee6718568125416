"""Flow matching: noise and latents on a straight line, and the ways to draw places on it.

A place is s in [0, 1]: 0 is the latents, 1 the noise. The ways to draw s and to weigh the loss are those of Esser et al. 2024
("Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 3) under the names that sd-scripts gives them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from library.core.options import option
from library.core.rules import Rule
from library.diffusion.noise import STEPS, NoiseOptions
from library.diffusion.process import NoiseProcess

TimestepSampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"]
WeightingScheme = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"]
SIGMOID = ("sigmoid", "shift", "flux_shift")  # the samplings that begin with the sigmoid of a normal number
FLUX_TOKENS, FLUX_MU = (256, 4096), (0.5, 1.15)  # patches of a picture, and the shift's logarithm at them


def _draws_by(scheme: str) -> Any:
    return lambda values: values["timestep_sampling"] != "sigma" or values["weighting_scheme"] != scheme


@dataclass(kw_only=True, frozen=True)
class FlowOptions(NoiseOptions):
    """Noise and timesteps."""

    timestep_sampling: TimestepSampling = option(
        "sigmoid",
        help="how places between picture and noise are drawn: sigma (by --weighting_scheme from 1000 shifted steps), uniform, sigmoid "
        "(of a normal number), shift (sigmoid, then shifted), flux_shift (sigmoid, then shifted more for larger pictures)",
    )
    sigmoid_scale: float = option(1.0, help="deviation of the normal number of sigmoid, shift and flux_shift")
    discrete_flow_shift: float = option(1.0, help="shift towards the noise, for --timestep_sampling shift and sigma; 1 shifts nothing")
    weighting_scheme: WeightingScheme = option(
        "uniform",
        help="weight of the loss: sigma_sqrt or cosmap, else 1; with --timestep_sampling sigma also how it draws: logit_normal, mode",
    )
    logit_mean: float = option(0.0, help="mean of the normal number of --weighting_scheme logit_normal")
    logit_std: float = option(1.0, help="deviation of the normal number of --weighting_scheme logit_normal")
    mode_scale: float = option(1.29, help="strength of --weighting_scheme mode")

    RULES: ClassVar[tuple[Rule, ...]] = (
        *NoiseOptions.RULES,
        Rule(
            option="discrete_flow_shift",
            when=lambda v: v["timestep_sampling"] not in ("shift", "sigma"),
            because="it is for --timestep_sampling shift and sigma",
        ),
        Rule(
            option="sigmoid_scale",
            when=lambda v: v["timestep_sampling"] not in SIGMOID,
            because=f"it is for --timestep_sampling {', '.join(SIGMOID)}",
        ),
        Rule(
            option="weighting_scheme",
            when=lambda v: v["weighting_scheme"] in ("logit_normal", "mode") and v["timestep_sampling"] != "sigma",
            because="logit_normal and mode are for --timestep_sampling sigma",
        ),
        Rule(
            option="logit_mean",
            when=_draws_by("logit_normal"),
            because="it is for --timestep_sampling sigma --weighting_scheme logit_normal",
        ),
        Rule(
            option="logit_std",
            when=_draws_by("logit_normal"),
            because="it is for --timestep_sampling sigma --weighting_scheme logit_normal",
        ),
        Rule(option="mode_scale", when=_draws_by("mode"), because="it is for --timestep_sampling sigma --weighting_scheme mode"),
    )

    def check(self) -> Any:
        """What is wrong: shifts and deviations that are not positive, or not finite."""
        yield from super().check()
        for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"--{name} {getattr(self, name):g}: must be more than 0 and finite"


class FlowProcess(NoiseProcess):
    """Rectified flow with velocity prediction: x_s = (1 - s) latents + s noise, whose derivative is noise - latents."""

    prediction_type = "flow"
    preview_sampler = "euler"
    preview_shift = 3.0

    def __init__(self, options: FlowOptions | None = None) -> None:
        self.noise_options = self.options = options or FlowOptions()

    def timesteps(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Places s (batch,) float32 in [0, 1]; `--min_timestep` and `--max_timestep` squeeze them into their range."""
        low, high = (bound / STEPS for bound in self.options.bounds)
        return low + (high - low) * self._places(shape, generator)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        s = _beside(timesteps, latents)
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        s = timesteps.float()
        if self.options.weighting_scheme == "sigma_sqrt":
            return s**-2
        if self.options.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * s + 2 * s**2))
        return torch.ones_like(s)

    def counted(self, timesteps: Tensor) -> Tensor:
        return STEPS * timesteps.float()

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """s / (1 - s); infinite at s = 1."""
        s = timesteps.float()
        return s / (1 - s)

    def sampler(self, name: str, steps: int, shift: float | None = None) -> "FlowEuler":
        """Euler's method, the one sampler there is here."""
        if name != "euler":
            raise ValueError(f"sampler {name}: a flow is followed with 'euler'")
        if shift is not None and not shift > 0:
            raise ValueError(f"flow shift {shift:g}: must be more than 0")
        return FlowEuler(steps, 1.0 if shift is None else shift)

    def _places(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        options, batch = self.options, shape[0]
        if options.timestep_sampling == "uniform":
            return 1 - torch.rand(batch, generator=generator)  # in (0, 1]: the loss weights know no 0
        if options.timestep_sampling == "sigma":
            return self._from_steps(batch, generator)
        s = torch.sigmoid(options.sigmoid_scale * torch.randn(batch, generator=generator))
        if options.timestep_sampling == "shift":
            return shifted(s, options.discrete_flow_shift)
        return shifted(s, flux_shift(shape)) if options.timestep_sampling == "flux_shift" else s

    def _from_steps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Places out of 1000 shifted steps, drawn by the weighting scheme's density; index 0 is the noise."""
        options = self.options
        if options.weighting_scheme == "logit_normal":
            u = torch.sigmoid(options.logit_mean + options.logit_std * torch.randn(batch, generator=generator))
        else:
            u = torch.rand(batch, generator=generator)
        if options.weighting_scheme == "mode":
            u = 1 - u - options.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        index = (u * STEPS).long().clamp(0, STEPS - 1)
        return shifted((STEPS - index) / STEPS, options.discrete_flow_shift)


@dataclass(frozen=True)
class Stepped:
    """What a step of a sampler gives, under diffusers' name."""

    prev_sample: Tensor


class FlowEuler:
    """Euler's method on `steps` + 1 places evenly from the noise to the latents, shifted; with the interface of diffusers' schedulers."""

    init_noise_sigma = 1.0

    def __init__(self, steps: int, shift: float) -> None:
        places = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
        self.timesteps = places[:-1]
        self._next = dict(zip(places[:-1].tolist(), places[1:].tolist(), strict=True))

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents as they are: a flow's model sees them unscaled."""
        return latents

    def step(self, guess: Tensor, timestep: Tensor, latents: Tensor) -> Stepped:
        """Latents at the next place, float32: moved along the velocity `guess` by the distance."""
        s = float(timestep)
        return Stepped(latents.float() + (self._next[s] - s) * guess.float())


def shifted(s: Tensor, shift: float) -> Tensor:
    """Places moved towards the noise: k s / (1 + (k - 1) s) (Esser et al. 2024, equation 23)."""
    return shift * s / (1 + (shift - 1) * s)


def flux_shift(shape: Sequence[int]) -> float:
    """The shift for latents of this shape: e to a power that grows evenly with the patches of 2x2 latents, as for FLUX.1."""
    tokens = (shape[-2] // 2) * (shape[-1] // 2)
    slope = (FLUX_MU[1] - FLUX_MU[0]) / (FLUX_TOKENS[1] - FLUX_TOKENS[0])
    return math.exp(FLUX_MU[0] + slope * (tokens - FLUX_TOKENS[0]))


def _beside(timesteps: Tensor, latents: Tensor) -> Tensor:
    return timesteps.to(latents.dtype).view(-1, *[1] * (latents.dim() - 1))
