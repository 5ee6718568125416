"""The phases of a run, each run once on fakes: what a training step, the caches and a preview take beyond what is there already."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.data.batch import Sizes, TextStates
from library.models.architecture import Architecture, Models, Tokens
from library.training.forecast.ledger import Ledger, total_bytes
from library.training.model import TrainingModel

GUIDED = 2  # a preview's denoiser sees the prompt and the negative prompt at once


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A batch of pictures of one size, in pixels."""

    width: int
    height: int
    batch: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What one training step takes: kept for the backward pass, gradients, and what else there is at the worst moment."""

    activations: int
    gradients: int
    working: int

    @property
    def peak(self) -> int:
        """All of it at the worst moment."""
        return self.activations + self.gradients + self.working


def step_bytes(model: TrainingModel, arch: Architecture, text: Tokens | TextStates, shape: Shape, trained: Sequence[Tensor]) -> StepBytes:
    """A forward and a backward pass of a batch; gradients of `trained` stay."""
    noisy, timesteps, sizes = step_inputs(arch, shape)
    with Ledger() as ledger:
        guess = model(noisy, timesteps, text, sizes)
        loss = F.mse_loss(guess.float(), noisy)
        del guess
        activations = ledger.alive
        loss.backward()
    gradients = sum(each.grad.numel() * each.grad.element_size() for each in trained if each.grad is not None)
    rest = ledger.peak - activations
    return StepBytes(activations=activations, gradients=min(gradients, rest), working=max(0, rest - gradients))


@torch.no_grad()
def text_bytes(arch: Architecture, encoders: Sequence[nn.Module], tokens: Tokens) -> tuple[int, TextStates]:
    """What encoding captions takes, and the states they become."""
    with Ledger() as ledger:
        states = arch.encode_text(encoders, tokens)
    return ledger.peak, states


@torch.no_grad()
def encoding_bytes(arch: Architecture, vae: nn.Module, shape: Shape) -> int:
    """What encoding pictures takes."""
    pixels = torch.zeros(shape.batch, 3, shape.height, shape.width)
    with Ledger() as ledger:
        arch.encode_images(vae, pixels, None)
    return ledger.peak + total_bytes([pixels])


@torch.no_grad()
def drawing_bytes(arch: Architecture, models: Models, text: TextStates, shape: Shape) -> int:
    """What drawing a picture takes: the worse of a step of the denoiser under guidance, and decoding."""
    noisy, timesteps, sizes = step_inputs(arch, Shape(width=shape.width, height=shape.height, batch=GUIDED * shape.batch))
    text = {name: torch.cat([state] * GUIDED) for name, state in text.items()}
    with Ledger() as denoising:
        arch.predict(models.denoiser, noisy, timesteps, text, sizes)
    if models.vae is None:
        return denoising.peak
    with Ledger() as decoding:
        arch.decode_latents(models.vae, noisy[: shape.batch])
    return max(denoising.peak, decoding.peak)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int] | None:
    """States that the first step of an optimizer over fakes makes, and what that step takes besides; None where it wants numbers."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, UnsupportedOperatorException

    with suppress(DataDependentOutputException, UnsupportedOperatorException, NotImplementedError, RuntimeError):
        with Ledger() as ledger:
            optimizer.step()
        states = state_bytes(optimizer)
        return states, max(0, ledger.peak - states)
    return None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of an optimizer's states, by what it holds and not by what it would save."""
    parameters = {id(each) for group in optimizer.param_groups for each in group["params"]}
    held = (value for state in optimizer.state.values() for value in _leaves(state))
    return total_bytes(value for value in held if isinstance(value, Tensor) and id(value) not in parameters)


def _leaves(state: Any) -> list[Any]:
    return list(state.values()) if isinstance(state, dict) else []


def step_inputs(arch: Architecture, shape: Shape) -> tuple[Tensor, Tensor, Sizes]:
    """Noisy latents, timesteps and sizes of a batch."""
    step = arch.pixels_per_latent
    noisy = torch.zeros(shape.batch, arch.latent_channels, shape.height // step, shape.width // step)
    pairs = torch.zeros(shape.batch, 2, dtype=torch.int64)
    return noisy, torch.zeros(shape.batch), Sizes(original=pairs, crop=pairs, target=pairs)
