"""One training step up to its loss: a pure function of the run's seed and the batch's place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.core.keyed_random import keyed_generator, keyed_seed
from library.data.batch import Batch, TextStates
from library.diffusion.loss import LossOptions, weigh
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture, Tokens


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


def batch_loss(context: StepContext, batch: Batch) -> Tensor:
    """The loss of a batch, a scalar with gradient. Noise, timesteps and dropouts depend on (seed, epoch, position) only."""
    key = (batch.epoch, batch.position)
    torch.manual_seed(keyed_seed(context.seed, "dropout", *key))
    latents = _latents(context, batch)
    generator = keyed_generator(context.seed, "noise", *key)
    noise = torch.randn(latents.shape, generator=generator).to(context.device)
    timesteps = context.process.timesteps(latents.shape, generator).to(context.device)
    noisy = context.process.corrupt(latents, noise, timesteps)
    guess = context.model(noisy, timesteps, _text(context, batch), batch.sizes.to(context.device))
    weights = batch.loss_weights.to(context.device) * context.process.loss_weights(timesteps)
    return weigh(guess, context.process.target(latents, noise, timesteps), weights, context.loss)


def _latents(context: StepContext, batch: Batch) -> Tensor:
    """The batch's model-ready latents, fp32: from the cache, or the mean of the VAE's posterior, as the cache holds it."""
    if batch.latents is not None:
        return batch.latents.to(context.device)
    assert batch.pixels is not None and context.vae is not None
    with torch.no_grad():
        return context.arch.encode_images(context.vae, batch.pixels.to(context.device), None).float()


def _text(context: StepContext, batch: Batch) -> Tokens | TextStates:
    text = batch.text or context.arch.tokenize(context.tokenizers, batch.captions, context.model_options)
    return {name: tensor.to(context.device) for name, tensor in text.items()}
