"""The loss on pictures that are held out: the same noise and timesteps every time, so that only the network changes it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from library.core.keyed_random import keyed_generator
from library.core.log import get_logger
from library.core.options import option
from library.data.batch import Batch
from library.data.dataset import TrainingData
from library.data.loader import batch_loader, workers_for
from library.diffusion.noise import shaped
from library.training.step import Drawn, StepContext, acting_at, latents_of, loss_at
from library.training.tracking.bands import NAMES, band_figures, band_sums

logger = get_logger(__name__)
SEED = 0  # of the noise and timesteps, in every run: losses of two runs on the same pictures can be compared
LEVELS = 4  # timesteps at which each picture is seen, one from each quarter of those that training draws
DRAWS = 64  # of a quarter, among which its timestep is chosen


@dataclass(kw_only=True, frozen=True)
class ValidationOptions:
    """Validation."""

    validate_every_n_steps: int | None = option(None, help="measure the validation loss after every n optimizer steps")
    validate_every_n_epochs: int | None = option(None, help="measure it after every n epochs; after every one where absent")
    max_validation_steps: int | None = option(None, help="measure it on this many batches at most, the same ones every time")

    def check(self) -> Iterable[str]:
        """What is wrong: numbers below one."""
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"

    def due_after_step(self, step: int) -> bool:
        """Is the loss measured after this optimizer step?"""
        return self.validate_every_n_steps is not None and step % self.validate_every_n_steps == 0

    def due_after_epoch(self, epoch: int) -> bool:
        """Is the loss measured after this epoch, counted from 1?"""
        return epoch % (self.validate_every_n_epochs or 1) == 0


def without_pictures(options: ValidationOptions, data: TrainingData) -> Iterator[str]:
    """One sentence for every option that was given in vain, where no picture is held out."""
    if data.validation is None:
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
            if getattr(options, name) is not None:
                yield f"--{name} has no effect: no picture is held out; give --validation_split or --validation_data_dir"


def validate(
    context: StepContext, data: TrainingData, accelerator: Accelerator, moment: Literal["step", "epoch"], *, most: int | None = None
) -> dict[str, float]:
    """The mean loss over held-out pictures (`TrainingData.validation`) and timesteps, by tracker key: `loss/validation/step_average`.

    And the mean in each band of timesteps, `loss/validation/step_band/0-250` and so on. `moment` is what ended. `most` bounds the batches
    (`--max_validation_steps`). Every rank measures its share, and all get the mean of all. Nothing of training is touched: the global
    random state and the network's mode are afterwards what they were.
    """
    own = replace(context, model=context.own_model)  # ranks may have different numbers of batches: none waits for another
    network = context.own_model.network
    was_training, sums = network.training, torch.zeros(2 + 2 * len(NAMES), dtype=torch.float64)
    network.eval()
    try:
        with torch.no_grad():
            for batch in _batches(data, accelerator, most):
                sums += _summed(own, batch).double().cpu()
    finally:
        network.train(was_training)
    shares = cast(Tensor, accelerator.gather(sums.unsqueeze(0).to(accelerator.device, torch.float32)))
    total, count, *bands = shares.sum(0).tolist()
    logger.info("validation: loss %.5f on %d pictures", total / count, count)
    return {f"loss/validation/{moment}_average": total / count, **band_figures(f"loss/validation/{moment}_band", bands)}


def fixed_draws(context: StepContext, batch: Batch, latents: Tensor) -> list[Drawn]:
    """What chance gives the pictures of a batch with these latents: `LEVELS` times a noise and a timestep, the same for ever.

    The timesteps are stratified: of many that training could draw one comes from the lowest quarter, one from the next, and so on. The
    noise is shaped as training shapes it, since that is what the model learns to predict; `--ip_noise_gamma`, which only makes training
    harder, is left out as dropouts are.
    """
    generators = [keyed_generator(SEED, "validation", image) for image, _ in batch.draws]
    timesteps = torch.stack([_levels(context, latents.shape, generator) for generator in generators], 1)
    noises = torch.stack([_noises(context, own, generator) for own, generator in zip(latents, generators, strict=True)], 1)
    return [Drawn(noise=noise, timesteps=level) for noise, level in zip(noises, timesteps, strict=True)]


# The parts


def _levels(context: StepContext, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Timesteps (LEVELS,) for a picture, ascending."""
    drawn = context.process.timesteps((LEVELS * DRAWS, *shape[1:]), generator).sort().values.view(LEVELS, DRAWS)
    return drawn[torch.arange(LEVELS), torch.randint(DRAWS, (LEVELS,), generator=generator)]


def _noises(context: StepContext, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Noises (LEVELS, channels, height, width) for the latents of a picture."""
    plain = torch.randn(LEVELS, *latents.shape, generator=generator)
    return torch.stack([shaped(noise, latents, context.process.noise_options, generator) for noise in plain])


def _summed(context: StepContext, batch: Batch) -> Tensor:
    """The losses of a batch's pictures, each the mean over its timesteps, summed; their number; and their sums and numbers in bands."""
    latents = latents_of(context, batch)
    with acting_at(context, batch.network_multiplier):
        losses = [loss_at(context, batch, latents, drawn) for drawn in fixed_draws(context, batch, latents)]
    total = torch.stack([loss.mean for loss in losses]).mean() * len(batch.images)
    every, timesteps = (torch.cat([getattr(loss, name) for loss in losses]) for name in ("of_samples", "timesteps"))
    bands = band_sums(every, timesteps, torch.ones_like(every, dtype=torch.bool))
    return torch.cat([torch.stack([total, torch.full_like(total, len(batch.images))]), bands.flatten()])


def _batches(data: TrainingData, accelerator: Accelerator, most: int | None) -> Iterator[Batch]:
    """This rank's batches, without those that only fill up the last turn of several ranks."""
    rank, world = accelerator.process_index, accelerator.num_processes
    count = min(len(data.order(0)), most or len(data.order(0)))
    own = range(rank, count, world)
    loader = batch_loader(data, 0, rank=rank, world=world, workers=min(workers_for(data), len(own)))
    yield from tqdm(islice(loader, len(own)), desc="validation", total=len(own), disable=not accelerator.is_local_main_process, leave=False)
