"""Options of noise and loss inside a step: what the denoiser is given, and what is asked of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_step import seen_by, toy_batch, toy_context

from library.core.keyed_random import keyed_generator
from library.diffusion.ddpm import DDPMOptions, DDPMProcess, PredictionOptions
from library.diffusion.flow import FlowOptions, FlowProcess
from library.diffusion.loss import LossOptions, huber_thresholds
from library.diffusion.process import NoiseProcess
from library.training.step import Drawn, StepContext, batch_loss, loss_at
from library.training.validation import fixed_draws

USES = [(3, 0), (8, 1), (8, 0), (2, 5)]
KINDS = {
    "offset": {"noise_offset": 0.3, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.2},
    "pyramid": {"multires_noise_iterations": 4},
    "perturbed": {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True},
    "pyramid, perturbed": {"multires_noise_iterations": 4, "ip_noise_gamma": 0.2},
}
Make = Callable[..., NoiseProcess]


@pytest.fixture(params=["betas", "flow"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "flow":
        return lambda **options: FlowProcess(FlowOptions(**options))
    return lambda **options: DDPMProcess(DDPMOptions(**options))


def given(process: NoiseProcess, uses: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Noisy latents and timestep that the denoiser is given for each use."""
    context = toy_context(process)
    batch_loss(context, toy_batch(uses))
    return dict(zip(uses, seen_by(context), strict=True))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_shaped_noise_of_a_use_knows_nothing_of_its_batch(make: Make, options: dict) -> None:
    whole = given(make(**options), USES)
    parts = [given(make(**options), part) for part in ([USES[2]], [USES[3], USES[0], USES[1]])]
    for use, (noisy, timestep) in whole.items():
        [alone] = [part[use] for part in parts if use in part]
        assert torch.equal(alone[0], noisy) and torch.equal(alone[1], timestep)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_shaping_leaves_the_plain_noise_and_the_timesteps_as_they_were(make: Make, options: dict) -> None:
    plain, other = given(make(), USES), given(make(**options), USES)
    assert all(torch.equal(plain[use][1], other[use][1]) for use in USES)
    assert not any(torch.equal(plain[use][0], other[use][0]) for use in USES)


def drawn_by(process: NoiseProcess, latents: Tensor) -> Drawn:
    return Drawn.of(process, latents, [keyed_generator(1, "test", index) for index in range(len(latents))])


def test_the_target_knows_the_shaped_noise_and_nothing_of_the_perturbation(make: Make) -> None:
    batch = toy_batch(USES)
    assert batch.latents is not None
    shaped = drawn_by(make(multires_noise_iterations=4), batch.latents)
    both = drawn_by(make(multires_noise_iterations=4, ip_noise_gamma=0.2), batch.latents)
    assert torch.equal(both.noise, shaped.noise) and shaped.mixed_in is None
    assert both.mixed_in is not None and float((both.mixed_in - both.noise).std()) == pytest.approx(0.2, rel=0.1)
    context = toy_context(make(multires_noise_iterations=4, ip_noise_gamma=0.2))
    process, asked = context.process, []
    kept_target = process.target
    process.target = lambda *given: asked.append(given) or kept_target(*given)  # pyright: ignore[reportAttributeAccessIssue]
    loss_at(context, batch, batch.latents, both)
    torch.testing.assert_close(asked[0][1], shaped.noise)
    noisy = torch.stack([noisy for noisy, _ in seen_by(context)])
    torch.testing.assert_close(noisy, process.corrupt(batch.latents, both.mixed_in, both.timesteps))


def guess_and_target(context: StepContext, target: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Guess, target and timesteps of a step at its first batch, computed by hand."""
    batch = toy_batch(USES)
    assert batch.latents is not None
    generators = [keyed_generator(context.seed, "noise", batch.epoch, *draw) for draw in batch.draws]
    drawn = Drawn.of(context.process, batch.latents, generators)
    noisy = context.process.corrupt(batch.latents, drawn.noise, drawn.timesteps)
    text: Any = batch.text
    guess = context.model(noisy, drawn.timesteps, text, batch.sizes)
    return guess.double(), target(batch.latents, drawn.noise, drawn.timesteps).double(), drawn.timesteps


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_a_step_measures_by_the_threshold_of_each_timestep(make: Make, loss_type: str) -> None:
    context = toy_context(make())
    context.loss = LossOptions(loss_type=loss_type, huber_schedule="exponential", huber_c=0.05)  # pyright: ignore[reportArgumentType]
    guess, target, timesteps = guess_and_target(context, context.process.target)
    thresholds = huber_thresholds(context.process, timesteps, context.loss)
    assert thresholds is not None
    c = thresholds.double().view(-1, 1, 1, 1)
    expected = (2 * (((guess - target) ** 2 + c**2).sqrt() - c) * (c if loss_type == "huber" else 1)).mean()
    assert batch_loss(context, toy_batch(USES)).mean.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_predicts_velocity_is_asked_for_it_and_weighed_by_its_snr() -> None:
    prediction = PredictionOptions(v_parameterization=True, zero_terminal_snr=True)
    context = toy_context(DDPMProcess(DDPMOptions(min_snr_gamma=5.0), prediction))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    def velocity(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        a = kept[timesteps].view(-1, 1, 1, 1)
        return a.sqrt() * noise.double() - (1 - a).sqrt() * latents.double()

    guess, target, timesteps = guess_and_target(context, velocity)
    snr = kept[timesteps] / (1 - kept[timesteps])
    expected = ((guess - target).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean()
    assert batch_loss(context, toy_batch(USES)).mean.item() == pytest.approx(expected.item(), rel=1e-3)


# Validation


def validated(process: NoiseProcess) -> list[Drawn]:
    batch = toy_batch(USES[:3])
    assert batch.latents is not None
    return fixed_draws(toy_context(process), batch, batch.latents)


def test_validation_shapes_its_noise_as_training_does(make: Make) -> None:
    plain, pyramids = validated(make()), validated(make(multires_noise_iterations=4, multires_noise_discount=0.9))
    for one, other in zip(plain, pyramids, strict=True):
        assert torch.equal(one.timesteps, other.timesteps) and not torch.equal(one.noise, other.noise)
        torch.testing.assert_close(other.noise.std((1, 2, 3)), torch.ones(3))


def test_validation_leaves_perturbation_out(make: Make) -> None:
    for one, other in zip(validated(make()), validated(make(ip_noise_gamma=0.5)), strict=True):
        assert torch.equal(one.noise, other.noise) and other.mixed_in is None
