"""What a step draws and how it measures, on a family of one layer."""

from functools import partial

import pytest
import torch
from toy_step import seen_by, toy_batch, toy_context

from library.diffusion.ddpm import DDPMProcess
from library.diffusion.flow import FlowOptions, FlowProcess
from library.diffusion.process import NoiseProcess
from library.training.step import batch_loss

SIGMA = FlowOptions(timestep_sampling="sigma", weighting_scheme="logit_normal")
PROCESSES = {"ddpm": DDPMProcess, "flow": FlowProcess, "flow-sigma": partial(FlowProcess, SIGMA)}
USES = [(3, 0), (8, 1), (8, 0), (2, 5)]


@pytest.fixture(params=PROCESSES)
def process(request: pytest.FixtureRequest) -> NoiseProcess:
    return PROCESSES[request.param]()


def drawn(process: NoiseProcess, *batches: list[tuple[int, int]], epoch: int = 0, seed: int = 5) -> dict:
    """What the denoiser is given for each use (noisy latents, timestep), where they stand in these batches."""
    context = toy_context(process, seed=seed)
    for position, uses in enumerate(batches):
        batch_loss(context, toy_batch(uses, epoch=epoch, position=position))
    every_use = [use for uses in batches for use in uses]
    return dict(zip(every_use, seen_by(context), strict=True))


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("batches", [[[use] for use in reversed(USES)], [USES[2:], USES[:2]], [USES[::-1]]], ids=["1", "2", "turned"])
def test_noise_and_timestep_of_a_use_know_nothing_of_its_batch(process: NoiseProcess, batches: list) -> None:
    whole, parts = drawn(process, USES), drawn(process, *batches)
    assert all(same(whole[use], parts[use]) for use in USES)


def test_every_use_epoch_and_seed_draws_anew(process: NoiseProcess) -> None:
    draws = [drawn(process, [(8, 0), (8, 1)]), drawn(process, [(8, 0)], epoch=1), drawn(process, [(8, 0)], seed=6)]
    noisy = [sample for draw in draws for sample, _ in draw.values()]
    assert len({tuple(sample.flatten().tolist()) for sample in noisy}) == 4


def test_the_loss_of_a_batch_is_the_mean_over_its_samples_alone(process: NoiseProcess) -> None:
    context = toy_context(process)
    alone = torch.stack([batch_loss(context, toy_batch([use])).mean for use in USES])
    torch.testing.assert_close(batch_loss(context, toy_batch(USES)).mean, alone.mean())


def test_noise_is_normal_and_timesteps_are_spread_as_one_generator_would() -> None:
    context = toy_context()
    context.process.corrupt = lambda latents, noise, timesteps: noise  # pyright: ignore[reportAttributeAccessIssue]
    batch_loss(context, toy_batch([(image, repeat) for image in range(50) for repeat in range(40)]))
    noise, timesteps = (torch.stack(tensors) for tensors in zip(*seen_by(context), strict=True))
    count = len(timesteps)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.01  # one use's noise says nothing of the next one's
    distance = (timesteps.sort().values.float() / 1000 - torch.arange(count) / count).abs().max()
    assert distance < 1.63 / count**0.5  # Kolmogorov-Smirnov at 1 %


def test_dropouts_are_a_function_of_epoch_and_position() -> None:
    def global_draw(**place: int) -> float:
        batch_loss(toy_context(), toy_batch(USES, **place))
        return float(torch.rand(()))

    draws = [global_draw(epoch=0, position=0), global_draw(epoch=0, position=1), global_draw(epoch=1, position=0)]
    assert draws[0] == global_draw(epoch=0, position=0) and len(set(draws)) == 3


def test_a_step_gives_the_network_its_gradient_and_the_base_none() -> None:
    context = toy_context()
    batch_loss(context, toy_batch(USES)).mean.backward()
    assert all(parameter.grad is not None for parameter in context.own_model.network.parameters())
    assert all(parameter.grad is None for parameter in context.own_model.denoiser.parameters())


def test_uncached_pixels_are_encoded_by_the_family() -> None:
    context, batch = toy_context(), toy_batch(USES)
    batch.pixels, batch.latents = torch.randn(len(USES), 3, 48, 48, generator=torch.Generator().manual_seed(1)), None
    context.vae = torch.nn.Identity()
    encoded = toy_batch(USES)
    encoded.latents = batch.pixels[:, :1, ::8, ::8].repeat(1, 4, 1, 1)
    assert torch.equal(batch_loss(context, batch).mean, batch_loss(context, encoded).mean)
