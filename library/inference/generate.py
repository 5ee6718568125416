"""Pictures from prompts: sampling with guidance, several networks, one seed a picture."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.data.batch import Sizes, TextStates
from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import Noise
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
    shift: float | None = None  # of a flow's steps towards the noise

    @property
    def guides(self) -> bool:
        """Is the negative prompt read?"""
        return self.scale != 1.0

    def alike(self, other: "Request") -> bool:
        """Can both be drawn in one batch?"""
        return self.shared() == other.shared()

    def shared(self) -> tuple[Any, ...]:
        """What pictures of one batch have in common."""
        return (self.width, self.height, self.steps, self.scale, self.sampler, self.shift, self.strengths)


@dataclass(kw_only=True)
class Generator:
    """The loaded models of a family, ready to draw."""

    arch: Architecture
    models: Models
    model_options: Any
    device: torch.device
    dtype: torch.dtype
    splits_guidance: bool = False  # run the prompt and the negative prompt one after the other: half the memory
    on_step: Callable[[], object] = lambda: None  # called after every step

    def __post_init__(self) -> None:
        self.process: NoiseProcess = self.arch.noise_process(model_options=self.model_options)

    def draw(self, requests: Sequence[Request]) -> Tensor:
        """Pixels (batch, 3, height, width) in [-1, 1] of requests that are `alike`."""
        return self.decode(self.sample(requests, self.encode(requests)))

    @torch.no_grad()
    def encode(self, requests: Sequence[Request]) -> list[TextStates]:
        """The text states of the prompts, and after them those of the negative prompts where the requests are guided."""
        texts = [[request.prompt for request in requests]]
        texts += [[request.negative for request in requests]] if requests[0].guides else []
        return [self._states(prompts) for prompts in texts]

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], text: Sequence[TextStates]) -> Tensor:
        """Latents (batch, channels, height, width) float32 of requests that are `alike`, from what `encode` gave for them."""
        first = requests[0]
        assert all(first.alike(request) for request in requests)
        conditions = [self.arch.conditioned(self.models.denoiser, states) for states in text]
        if len(conditions) == 2 and not self.splits_guidance:
            asked, without = conditions
            conditions = [{name: torch.cat([without[name], states]) for name, states in asked.items()}]
        scheduler = self.process.sampler(first.sampler, first.steps, first.shift)
        side = self.arch.pixels_per_latent
        noise = Noise([request.seed for request in requests], self.device)
        latents = noise((len(requests), self.arch.latent_channels, first.height // side, first.width // side)) * scheduler.init_noise_sigma
        draws = {"generator": noise.generators} if _draws_noise(scheduler) else {}
        for timestep in scheduler.timesteps:
            guess = self._guided(first, scheduler.scale_model_input(latents, timestep), float(timestep), conditions)
            latents = scheduler.step(guess, timestep, latents, **draws).prev_sample
            self.on_step()
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [-1, 1]."""
        assert self.models.vae is not None
        return self.arch.decode_latents(self.models.vae, latents)

    def _guided(self, request: Request, latents: Tensor, timestep: float, conditions: Sequence[TextStates]) -> Tensor:
        """The guess in float32, led away from the negative prompt (Ho & Salimans 2022, equation 6)."""
        if not request.guides:
            return self._guess(request, latents, timestep, conditions[0])
        if self.splits_guidance:
            asked, without = (self._guess(request, latents, timestep, states) for states in conditions)
        else:
            without, asked = self._guess(request, torch.cat([latents, latents]), timestep, conditions[0]).chunk(2)
        return without + request.scale * (asked - without)

    def _guess(self, request: Request, latents: Tensor, timestep: float, text: TextStates) -> Tensor:
        timesteps = torch.full((len(latents),), timestep, device=self.device)
        sizes = _sizes(request, len(latents)).to(self.device)
        return self.arch.predict(self.models.denoiser, latents.to(self.dtype), timesteps, text, sizes).float()

    def _states(self, prompts: list[str]) -> TextStates:
        return states_of(self.arch, self.models.text_encoders, self.models.tokenizers, self.model_options, prompts)


@torch.no_grad()
def states_of(
    arch: Architecture, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any], model_options: Any, prompts: Sequence[str]
) -> TextStates:
    """The text states of prompts, computed where the text encoders are and left there."""
    device = next(text_encoders[0].parameters()).device
    tokens = arch.tokenize(tokenizers, prompts, model_options)
    return arch.encode_text(text_encoders, {name: ids.to(device) for name, ids in tokens.items()})


def batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """The requests in their order, up to `size` neighbours that are `alike` in each batch."""
    found: list[list[Request]] = []
    for request in requests:
        if found and len(found[-1]) < size and found[-1][0].alike(request):
            found[-1].append(request)
        else:
            found.append([request])
    return found


def size_problems(request: Request, arch: Architecture) -> Iterator[str]:
    """What is wrong with a request's width and height, with the size that is near."""
    step, longest = arch.resolution_step, arch.longest_side
    for name, side in (("width", request.width), ("height", request.height)):
        if longest is not None and side > longest:
            yield f"{name} {side}: {arch.title} draws at most {longest}"
        if side % step:
            yield f"{name} {side}: {arch.title} draws multiples of {step}; try {max(step, round(side / step) * step)}"


def _sizes(request: Request, batch: int) -> Sizes:
    size = torch.tensor([[request.height, request.width]]).repeat(batch, 1)
    return Sizes(original=size, crop=torch.zeros_like(size), target=size)


def _draws_noise(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
