"""Every sampler leads from noise to the picture that a perfect denoiser knows, whatever the model predicts."""

import pytest
import torch
from torch import Tensor

from library.diffusion.ddpm import DDPMProcess, PredictionOptions
from library.diffusion.samplers import SAMPLERS, Noise, build_sampler, rescaled_betas

PREDICTIONS = {
    "noise": PredictionOptions(),
    "velocity": PredictionOptions(v_parameterization=True),
    "zero snr": PredictionOptions(v_parameterization=True, zero_terminal_snr=True),
}
MEAN, SPREAD = 0.5, 0.6  # of the normal numbers that the pictures of a Gaussian denoiser are made of
ANCESTRAL = ("euler_a", "dpm_2_a")  # draw noise on the way, so that no picture can be foretold


@pytest.fixture(params=PREDICTIONS)
def prediction(request: pytest.FixtureRequest) -> PredictionOptions:
    return PREDICTIONS[request.param]


def drawn(name: str, prediction: PredictionOptions, picture: Tensor | None, steps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What comes of a noise, and the noise. The denoiser knows the one picture, or that all numbers are normal around MEAN."""
    scheduler, kept = build_sampler(name, steps, prediction), DDPMProcess(prediction=prediction).scheduler.alphas_cumprod.double()
    noise = Noise([0], torch.device("cpu"))(shape)
    latents = noise * scheduler.init_noise_sigma
    torch.manual_seed(0)  # of the ancestral samplers' draws
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep).double()
        at = torch.as_tensor(timestep, dtype=torch.float64).clamp(0, 999)
        low, high = kept[at.floor().long()], kept[at.ceil().long()]
        a = low + (high - low) * (at - at.floor())
        guessed = a.sqrt() * SPREAD**2 / (a * SPREAD**2 + 1 - a) * (seen - a.sqrt() * MEAN) + MEAN if picture is None else picture
        eps = (seen - a.sqrt() * guessed) / (1 - a).sqrt()
        answer = a.sqrt() * eps - (1 - a).sqrt() * guessed if prediction.v_parameterization else eps
        latents = scheduler.step(answer.float(), timestep, latents).prev_sample
        assert torch.isfinite(latents).all()
    return latents, noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_picture_that_a_perfect_denoiser_knows(name: str, prediction: PredictionOptions) -> None:
    picture = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    found, _ = drawn(name, prediction, picture, 30, (1, 4, 8, 8))
    assert (found - picture).abs().max() < 0.15  # ddim and pndm end at the first timestep, with 3 % of the noise left


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ANCESTRAL and not name.startswith("k_")])
def test_samplers_follow_the_flow_of_a_gaussian(name: str, prediction: PredictionOptions) -> None:
    found, noise = drawn(name, prediction, None, 60, (1, 4, 32, 32))
    assert (found - (MEAN + SPREAD * noise)).abs().max() < 0.13


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("k_")])
def test_sampling_from_pure_noise_has_the_brightness_of_the_pictures(name: str) -> None:
    found, _ = drawn(name, PREDICTIONS["zero snr"], None, 20, (1, 4, 48, 48))
    assert abs(float(found.mean()) - MEAN) < 0.03


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_begins_at_the_last_timestep_where_it_is_pure_noise(name: str) -> None:
    assert float(build_sampler(name, 20, PREDICTIONS["zero snr"]).timesteps[0]) == 999


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 200])
def test_few_and_many_steps_can_be_taken(name: str, steps: int, prediction: PredictionOptions) -> None:
    scheduler = build_sampler(name, steps, prediction)
    assert len(scheduler.timesteps) >= steps


def test_rescaled_betas_keep_the_first_share_and_end_in_noise() -> None:
    betas = rescaled_betas()
    kept = torch.cumprod(1 - betas, 0)
    root = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).sqrt()
    assert kept[0] == pytest.approx(1 - 0.00085) and kept[-1] == pytest.approx(2.0**-24)
    moved = (kept[:-1].sqrt() - kept[0].sqrt()) / (root[:-1] - root[0]).clamp(max=-1e-9)
    torch.testing.assert_close(moved[1:], torch.full((998,), float(root[0] / (root[0] - root[-1]))).double(), rtol=1e-5, atol=0)


def test_noise_prediction_knows_no_shift() -> None:
    for prediction, what in ((None, "noise"), (PREDICTIONS["velocity"], "velocity")):
        with pytest.raises(ValueError, match=f"flow shift 3: this model predicts {what}"):
            DDPMProcess(prediction=prediction).sampler("ddim", 5, 3.0)


def test_noise_of_a_picture_does_not_depend_on_its_place_in_the_batch() -> None:
    device = torch.device("cpu")
    alone, together = Noise([5], device)((1, 4, 8, 8)), Noise([9, 5], device)((2, 4, 8, 8))
    assert torch.equal(alone[0], together[1])
