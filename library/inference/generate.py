"""Pictures from prompts: sampling with guidance, several networks, one seed a picture."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.data.batch import Sizes, TextStates
from library.diffusion.samplers import Noise, build_sampler
from library.models.architecture import Architecture, Models


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to draw."""

    prompt: str
    negative: str
    width: int
    height: int
    steps: int
    scale: float
    sampler: str
    seed: int
    strengths: tuple[float, ...] = ()  # of the networks, in their order

    def alike(self, other: "Request") -> bool:
        """Can both be drawn in one batch?"""
        return self.shared() == other.shared()

    def shared(self) -> tuple[Any, ...]:
        """What pictures of one batch have in common."""
        return (self.width, self.height, self.steps, self.scale, self.sampler, self.strengths)


@dataclass(kw_only=True)
class Generator:
    """The loaded models of a family, ready to draw."""

    arch: Architecture
    models: Models
    model_options: Any
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def draw(self, requests: Sequence[Request]) -> Tensor:
        """Pixels (batch, 3, height, width) in [-1, 1] of requests that are `alike`."""
        first = requests[0]
        assert all(first.alike(request) for request in requests)
        text = self._encode([request.prompt for request in requests])
        guides = first.scale != 1.0
        if guides:
            negative = self._encode([request.negative for request in requests])
            text = {name: torch.cat([negative[name], states]) for name, states in text.items()}
        latents = self._sample(requests, text, guides)
        assert self.models.vae is not None
        return self.arch.decode_latents(self.models.vae, latents)

    def _sample(self, requests: Sequence[Request], text: TextStates, guides: bool) -> Tensor:
        first = requests[0]
        scheduler = build_sampler(first.sampler, first.steps)
        side = self.arch.pixels_per_latent
        noise = Noise([request.seed for request in requests], self.device)
        latents = noise((len(requests), self.arch.latent_channels, first.height // side, first.width // side)) * scheduler.init_noise_sigma
        sizes = _sizes(first, len(requests) * (2 if guides else 1)).to(self.device)
        draws = {"generator": noise.generators} if _draws_noise(scheduler) else {}
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guides else latents
            doubled = scheduler.scale_model_input(doubled, timestep)
            timesteps = torch.full((len(doubled),), float(timestep), device=self.device)
            guess = self.arch.predict(self.models.denoiser, doubled.to(self.dtype), timesteps, text, sizes).float()
            if guides:
                without, asked = guess.chunk(2)
                guess = without + first.scale * (asked - without)  # Ho & Salimans 2022, equation 6
            latents = scheduler.step(guess, timestep, latents, **draws).prev_sample
        return latents

    def _encode(self, prompts: list[str]) -> TextStates:
        tokens = self.arch.tokenize(self.models.tokenizers, prompts, self.model_options)
        return self.arch.encode_text(self.models.text_encoders, {name: ids.to(self.device) for name, ids in tokens.items()})


def _sizes(request: Request, batch: int) -> Sizes:
    size = torch.tensor([[request.height, request.width]]).repeat(batch, 1)
    return Sizes(original=size, crop=torch.zeros_like(size), target=size)


def _draws_noise(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
