"""Diffusion on betas against its formulas, written anew in float64: noising, targets and loss weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.core.rules import without_effect
from library.diffusion.ddpm import DDPMOptions, DDPMProcess, PredictionOptions

VELOCITY = PredictionOptions(v_parameterization=True)
ZERO_SNR = PredictionOptions(v_parameterization=True, zero_terminal_snr=True)
TIMESTEPS = torch.tensor([0, 1, 30, 250, 500, 850, 998])


def kept_shares(rescaled: bool = False) -> np.ndarray:
    """How much of the picture is left at each timestep, by power; rescaled by algorithm 1 of Lin et al. 2024."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    root = np.sqrt(kept)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 if rescaled else kept


def snr_at(timesteps: torch.Tensor, rescaled: bool = False) -> np.ndarray:
    kept = kept_shares(rescaled)[timesteps.numpy()]
    return kept / (1 - kept)


def weights(prediction: PredictionOptions | None = None, timesteps: torch.Tensor = TIMESTEPS, **options: object) -> np.ndarray:
    process = DDPMProcess(DDPMOptions(**options), prediction)  # pyright: ignore[reportArgumentType]
    return process.loss_weights(timesteps).double().numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # diffusers multiplies a thousand numbers in float32


# Noising


@pytest.mark.parametrize("prediction", [None, VELOCITY, ZERO_SNR], ids=["noise", "velocity", "zero snr"])
def test_corrupt_follows_the_closed_form(prediction: PredictionOptions | None) -> None:
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([0, 999])
    kept = torch.tensor(kept_shares(prediction is ZERO_SNR)[timesteps.numpy()]).float().view(-1, 1, 1, 1)
    expected = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    torch.testing.assert_close(DDPMProcess(prediction=prediction).corrupt(latents, noise, timesteps), expected, rtol=1e-4, atol=3e-5)


def test_the_target_is_the_noise_or_the_velocity() -> None:
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([10, 700])
    kept = torch.tensor(kept_shares()[timesteps.numpy()]).float().view(-1, 1, 1, 1)
    assert torch.equal(DDPMProcess().target(latents, noise, timesteps), noise)
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(DDPMProcess(prediction=VELOCITY).target(latents, noise, timesteps), velocity, rtol=1e-4, atol=1e-5)


def test_with_zero_terminal_snr_the_last_input_is_the_noise_and_the_velocity_the_picture() -> None:
    latents, noise, last = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([999])
    process = DDPMProcess(prediction=ZERO_SNR)
    assert torch.equal(process.corrupt(latents, noise, last), noise) and torch.equal(process.target(latents, noise, last), -latents)
    assert process.sigmas(last).item() == math.inf


def test_zero_terminal_snr_of_a_model_that_predicts_noise_is_refused() -> None:
    (problem,) = PredictionOptions(zero_terminal_snr=True).prediction_problems()
    assert problem.startswith("--zero_terminal_snr: needs a model that predicts velocity (--v_parameterization)")
    assert list(ZERO_SNR.prediction_problems()) == []


def test_files_name_the_prediction() -> None:
    assert [DDPMProcess(prediction=prediction).prediction_type for prediction in (None, VELOCITY, ZERO_SNR)] == ["epsilon", "v", "v"]


def test_timesteps_come_from_the_generator_alone() -> None:
    process = DDPMProcess()
    drawn = [process.timesteps((64, 4, 8, 8), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].min() >= 0 and drawn[0].max() < 1000


def test_timesteps_stay_in_the_range_that_is_asked_for() -> None:
    drawn = DDPMProcess(DDPMOptions(min_timestep=200, max_timestep=210)).timesteps((500, 4, 8, 8), torch.Generator().manual_seed(3))
    assert set(drawn.tolist()) == set(range(200, 210))


def test_the_noise_for_one_part_of_picture_is_that_of_the_betas() -> None:
    close(DDPMProcess().sigmas(TIMESTEPS).numpy(), snr_at(TIMESTEPS) ** -0.5)


# Loss weights


def test_without_options_all_timesteps_weigh_exactly_one() -> None:
    assert torch.equal(DDPMProcess().loss_weights(torch.arange(1000)), torch.ones(1000))


@given(gamma=st.floats(0.01, 2000), timestep=st.integers(0, 999), is_velocity=st.booleans())
@settings(max_examples=50, deadline=None)
def test_min_snr_weighs_by_its_formula(gamma: float, timestep: int, is_velocity: bool) -> None:
    at = torch.tensor([timestep])
    snr = snr_at(at)
    expected = np.minimum(snr, gamma) / (snr + 1 if is_velocity else snr)
    close(weights(VELOCITY if is_velocity else None, at, min_snr_gamma=gamma), expected)


def test_debiased_estimation_weighs_by_its_formulas() -> None:
    snr = np.minimum(snr_at(TIMESTEPS), 1000)
    close(weights(debiased_estimation_loss=True), snr**-0.5)
    close(weights(VELOCITY, debiased_estimation_loss=True), 1 / (snr + 1))


def test_v_prediction_is_scaled_like_noise_prediction() -> None:
    snr = np.minimum(snr_at(TIMESTEPS), 1000)
    close(weights(VELOCITY, scale_v_pred_loss_like_noise_pred=True), snr / (snr + 1))


def test_a_v_prediction_like_loss_is_added() -> None:
    snr = np.minimum(snr_at(TIMESTEPS), 1000)
    close(weights(v_pred_like_loss=0.7), 1 + 0.7 / (snr / (snr + 1)))


def test_weights_are_multiplied() -> None:
    both = weights(VELOCITY, min_snr_gamma=5.0, debiased_estimation_loss=True, scale_v_pred_loss_like_noise_pred=True)
    one_by_one = [{"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {"scale_v_pred_loss_like_noise_pred": True}]
    close(both, np.prod([weights(VELOCITY, **own) for own in one_by_one], axis=0))


@pytest.mark.parametrize(
    ("options", "last"),
    [({"min_snr_gamma": 5.0}, 0.0), ({"debiased_estimation_loss": True}, 1.0), ({"scale_v_pred_loss_like_noise_pred": True}, 0.0)],
)
def test_zero_terminal_snr_weighs_by_the_betas_it_noises_with(options: dict, last: float) -> None:
    snr, capped = snr_at(TIMESTEPS, rescaled=True), np.minimum(snr_at(TIMESTEPS, rescaled=True), 1000)
    expected = {
        "min_snr_gamma": np.minimum(snr, 5) / (snr + 1),
        "debiased_estimation_loss": 1 / (capped + 1),
        "scale_v_pred_loss_like_noise_pred": capped / (capped + 1),
    }
    np.testing.assert_allclose(weights(ZERO_SNR, **options), expected[next(iter(options))], rtol=5e-3)
    assert weights(ZERO_SNR, torch.tensor([999]), **options) == [last]


@pytest.mark.parametrize("prediction", [None, VELOCITY, ZERO_SNR], ids=["noise", "velocity", "zero snr"])
def test_all_weights_together_are_finite_everywhere(prediction: PredictionOptions | None) -> None:
    found = weights(
        prediction, torch.arange(1000), min_snr_gamma=5.0, debiased_estimation_loss=True, scale_v_pred_loss_like_noise_pred=True,
        v_pred_like_loss=1.0,
    )  # fmt: skip
    assert np.isfinite(found).all() and (found >= 0).all()


def test_zero_turns_a_weight_off() -> None:
    assert (weights(min_snr_gamma=0.0, v_pred_like_loss=0.0) == 1).all()


@pytest.mark.parametrize("name", ["min_snr_gamma", "v_pred_like_loss"])
@pytest.mark.parametrize("value", [-1.0, math.inf])
def test_negative_and_infinite_weights_are_refused(name: str, value: float) -> None:
    (problem,) = DDPMOptions(**{name: value}).check()  # pyright: ignore[reportArgumentType]
    assert problem.startswith(f"--{name} {value:g}: ")


# Options in vain


def said(*argv: str) -> list[str]:
    class Both(PredictionOptions):
        """Model."""

    options = parse_command_line([Both, DDPMOptions], argv, prog="test", about="test")
    return [sentence.split(" has no effect")[0] for sentence in without_effect(options, DDPMOptions.RULES)]


def test_weights_of_the_other_prediction_are_in_vain_and_change_nothing() -> None:
    assert said("--scale_v_pred_loss_like_noise_pred") == ["--scale_v_pred_loss_like_noise_pred"]
    assert said("--v_parameterization", "--v_pred_like_loss", "1") == ["--v_pred_like_loss"]
    assert said("--v_parameterization", "--scale_v_pred_loss_like_noise_pred") == said("--v_pred_like_loss", "1") == []
    assert (weights(scale_v_pred_loss_like_noise_pred=True) == 1).all() and (weights(VELOCITY, v_pred_like_loss=1.0) == 1).all()


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        said("--min_snr_gamma", "-1", "--noise_offset", "0.1", "--multires_noise_iterations", "6", "--max_timestep", "0")
    assert [problem.split(" ")[0].rstrip(":") for problem in caught.value.problems] == [
        "--max_timestep", "--noise_offset", "--min_snr_gamma",
    ]  # fmt: skip
