"""Noise process, loss and samplers against their formulas."""

import pytest
import torch

from library.diffusion.loss import LossOptions, weigh
from library.diffusion.process import DDPMProcess, TimestepRange
from library.diffusion.samplers import SAMPLERS, Noise, build_sampler


def test_corrupt_follows_the_closed_form() -> None:
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([0, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[timesteps].float().view(-1, 1, 1, 1)
    expected = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    torch.testing.assert_close(DDPMProcess().corrupt(latents, noise, timesteps), expected, rtol=1e-4, atol=1e-5)


def test_timesteps_come_from_the_generator_alone() -> None:
    process = DDPMProcess()
    drawn = [process.timesteps((64, 4, 8, 8), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].min() >= 0 and drawn[0].max() < 1000


def test_timesteps_stay_in_the_range_that_is_asked_for() -> None:
    drawn = DDPMProcess(TimestepRange(min_timestep=200, max_timestep=210)).timesteps((500, 4, 8, 8), torch.Generator().manual_seed(3))
    assert set(drawn.tolist()) == set(range(200, 210))


@pytest.mark.parametrize(
    ("low", "high", "named"), [(500, 500, "--max_timestep"), (-1, None, "--min_timestep"), (None, 1001, "--max_timestep")]
)
def test_a_range_without_a_timestep_is_refused(low: int | None, high: int | None, named: str) -> None:
    (problem,) = TimestepRange(min_timestep=low, max_timestep=high).check()
    assert problem.startswith(named)


def test_noise_prediction_weighs_all_timesteps_alike_and_knows_no_shift() -> None:
    process = DDPMProcess()
    assert torch.equal(process.loss_weights(torch.tensor([0, 999])), torch.ones(2))
    with pytest.raises(ValueError, match="flow shift 3"):
        process.sampler("ddim", 5, 3.0)


def test_loss_is_the_weighted_mean_of_the_samples() -> None:
    guess, target, weights = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1.0, 0.5, 0.0])
    errors = (guess - target).square().mean((1, 2, 3))
    torch.testing.assert_close(weigh(guess, target, weights, LossOptions()), (errors * weights).mean())
    errors = (guess - target).abs().mean((1, 2, 3))
    torch.testing.assert_close(weigh(guess, target, weights, LossOptions(loss_type="l1")), (errors * weights).mean())


def test_loss_of_half_precision_guesses_is_taken_in_fp32() -> None:
    guess = torch.full((1, 4, 64, 64), 200.0, dtype=torch.float16)
    assert weigh(guess, torch.full_like(guess, -200.0), torch.ones(1), LossOptions()).item() == 160000.0


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_picture_that_a_perfect_denoiser_knows(name: str) -> None:
    picture = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    scheduler = build_sampler(name, 30)
    latents = Noise([0], torch.device("cpu"))(picture.shape) * scheduler.init_noise_sigma
    kept = DDPMProcess().scheduler.alphas_cumprod
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        at = torch.as_tensor(timestep, dtype=torch.float64).clamp(0, 999)
        low = kept.double()[at.floor().long()]
        high = kept.double()[at.ceil().long()]
        share = low + (high - low) * (at - at.floor())
        guess = ((seen - share.sqrt() * picture) / (1 - share).sqrt()).float()
        latents = scheduler.step(guess, timestep, latents).prev_sample
    assert (latents - picture).abs().max() < 0.15  # ddim and pndm end at the first timestep, with 3 % of the noise left


def test_noise_of_a_picture_does_not_depend_on_its_place_in_the_batch() -> None:
    device = torch.device("cpu")
    alone, together = Noise([5], device)((1, 4, 8, 8)), Noise([9, 5], device)((2, 4, 8, 8))
    assert torch.equal(alone[0], together[1])
