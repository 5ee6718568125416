"""One training step up to its loss: a pure function of the run's seed and of what stands in the batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from library.core.keyed_random import keyed_generator, keyed_seed
from library.data.batch import Batch, Sizes, TextStates
from library.diffusion.loss import LossOptions, huber_thresholds, weigh
from library.diffusion.noise import perturbed, shaped
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture, Tokens
from library.training.model import TrainingModel
from networks.protocol import TrainableNetwork


@dataclass(kw_only=True)
class StepContext:
    """What a step needs besides its batch."""

    arch: Architecture
    process: NoiseProcess
    model: nn.Module  # the prepared TrainingModel
    vae: nn.Module | None
    tokenizers: Sequence[Any]
    model_options: Any
    loss: LossOptions
    seed: int
    device: torch.device

    @cached_property
    def own_model(self) -> TrainingModel:
        """The model without what distributes it: calling it waits for no other rank."""  # accelerate looks through all modules for it
        return cast(TrainingModel, extract_model_from_parallel(self.model))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What chance gave a batch: noise in the shape of its latents, and a timestep for each sample (batch,)."""

    noise: Tensor  # that the target is made of
    timesteps: Tensor
    mixed_in: Tensor | None = None  # the noise of the input, where it is another

    @classmethod
    def of(cls, process: NoiseProcess, latents: Tensor, generators: Sequence[torch.Generator]) -> "Drawn":
        """Noise and then a timestep for these latents, each sample's from its own generator, on the CPU; then what shapes its noise."""
        options, shape = process.noise_options, latents.shape
        plain = [torch.randn(shape[1:], generator=generator) for generator in generators]
        timesteps = [process.timesteps((1, *shape[1:]), generator) for generator in generators]
        noise = [shaped(own, row, options, generator) for own, row, generator in zip(plain, latents, generators, strict=True)]
        mixed_in = [perturbed(own, options, generator) for own, generator in zip(noise, generators, strict=True)]
        return cls(
            noise=torch.stack(noise), timesteps=torch.cat(timesteps), mixed_in=torch.stack(mixed_in) if options.ip_noise_gamma else None
        )

    def to(self, device: torch.device | str) -> "Drawn":
        """The same on another device."""
        noise, timesteps = (tensor.to(device, non_blocking=True) for tensor in (self.noise, self.timesteps))
        return Drawn(noise=noise, timesteps=timesteps, mixed_in=self.mixed_in if self.mixed_in is None else self.mixed_in.to(device))


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """The losses of a batch's samples, and how noisy each was."""

    of_samples: Tensor  # (batch,) float32 with gradient, weighed
    timesteps: Tensor  # (batch,) float32, counted from 0 to 1000 whatever the denoiser takes

    @property
    def mean(self) -> Tensor:
        """What is trained on, a scalar."""
        return self.of_samples.mean()


def batch_loss(context: StepContext, batch: Batch) -> BatchLoss:
    """The loss of a batch, with gradient.

    The noise and timestep of a sample depend on (seed, epoch, image, repeat) only, not on the batch it stands in or the rank that
    computes it; the network's dropouts on (seed, epoch, position). Call it within `acting_at`, and go backward there too.
    """
    torch.manual_seed(keyed_seed(context.seed, "dropout", batch.epoch, batch.position))
    latents = latents_of(context, batch)
    generators = [keyed_generator(context.seed, "noise", batch.epoch, *draw) for draw in batch.draws]
    return loss_at(context, batch, latents, Drawn.of(context.process, latents, generators))


def loss_at(context: StepContext, batch: Batch, latents: Tensor, drawn: Drawn) -> BatchLoss:
    """The loss of a batch for latents, noise and timesteps that are given."""
    process, drawn = context.process, drawn.to(context.device)
    noisy = process.corrupt(latents, drawn.noise if drawn.mixed_in is None else drawn.mixed_in, drawn.timesteps)
    target = process.target(latents, drawn.noise, drawn.timesteps)
    text, sizes = _text(context, batch), batch.sizes.to(context.device)
    if batch.preserves is not None and batch.preserves.any():
        rows = batch.preserves.nonzero().squeeze(1).to(context.device)
        with torch.no_grad(), acting_at(context, 0.0, then=batch.network_multiplier):
            base = context.own_model(*_rows(rows, noisy, drawn.timesteps, text, sizes))
        target = target.index_copy(0, rows, base.to(target.dtype))
    guess = context.model(noisy, drawn.timesteps, text, sizes)
    weights = batch.loss_weights.to(context.device, non_blocking=True) * process.loss_weights(drawn.timesteps)
    mask = None if batch.mask is None else batch.mask.to(context.device, non_blocking=True)
    thresholds = huber_thresholds(process, drawn.timesteps, context.loss)
    losses = weigh(guess, target, weights, context.loss, mask, thresholds=thresholds)
    return BatchLoss(of_samples=losses, timesteps=process.counted(drawn.timesteps))


def latents_of(context: StepContext, batch: Batch) -> Tensor:
    """The batch's model-ready latents, fp32: from the cache, or the mean of the VAE's posterior, as the cache holds it."""
    if batch.latents is not None:
        return batch.latents.to(context.device, non_blocking=True)
    assert batch.pixels is not None and context.vae is not None
    with torch.no_grad():
        return context.arch.encode_images(context.vae, batch.pixels.to(context.device, non_blocking=True), None).float()


@contextmanager
def acting_at(context: StepContext, strength: float, then: float = 1.0) -> Iterator[None]:
    """Let the network act at a strength, and at `then` after it: 1, for all that knows nothing of `network_multiplier`.

    A backward belongs inside: blocks under gradient checkpointing compute once more in it.
    """
    network = cast(TrainableNetwork, context.own_model.network)
    if strength != then:
        network.set_multiplier(strength)
    try:
        yield
    finally:
        if strength != then:
            network.set_multiplier(then)


def _text(context: StepContext, batch: Batch) -> Tokens | TextStates:
    text = batch.text or context.arch.tokenize(context.tokenizers, batch.captions, context.model_options)
    return {name: tensor.to(context.device, non_blocking=True) for name, tensor in text.items()}


def _rows(rows: Tensor, noisy: Tensor, timesteps: Tensor, text: Tokens | TextStates, sizes: Sizes) -> tuple[Any, ...]:
    """What the model takes, for some samples of a batch."""
    chosen = replace(sizes, original=sizes.original[rows], crop=sizes.crop[rows], target=sizes.target[rows])
    return noisy[rows], timesteps[rows], {name: tensor[rows] for name, tensor in text.items()}, chosen
