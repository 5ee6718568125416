"""The robust losses against their formulas, written anew in float64, on both kinds of noise process."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.core.command_line import parse_command_line
from library.core.rules import without_effect
from library.diffusion.ddpm import DDPMProcess, PredictionOptions
from library.diffusion.flow import FlowProcess
from library.diffusion.loss import LossOptions, huber_thresholds, weigh
from library.diffusion.process import NoiseProcess

BETAS, FLOW = DDPMProcess(), FlowProcess()
ENDS_IN_NOISE = DDPMProcess(prediction=PredictionOptions(v_parameterization=True, zero_terminal_snr=True))
TIMESTEPS = {BETAS: torch.tensor([0, 1, 100, 500, 999]), FLOW: torch.tensor([0.0, 0.001, 0.1, 0.5, 1.0])}


def thresholds(process: NoiseProcess, timesteps: Tensor, **options: object) -> np.ndarray:
    found = huber_thresholds(process, timesteps, LossOptions(loss_type="huber", **options))  # pyright: ignore[reportArgumentType]
    assert found is not None
    return found.double().numpy()


def sigma_of(process: NoiseProcess) -> np.ndarray:
    t = TIMESTEPS[process].double().numpy()
    if process is FLOW:
        return np.divide(t, 1 - t, out=np.full_like(t, np.inf), where=t < 1)
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t.astype(int)]
    return np.sqrt((1 - kept) / kept)


@pytest.fixture(params=[BETAS, FLOW], ids=["betas", "flow"])
def process(request: pytest.FixtureRequest) -> NoiseProcess:
    return request.param


@pytest.mark.parametrize("c", [0.01, 0.1, 0.7])
def test_an_exponential_threshold_falls_from_the_scale_to_c_times_it(process: NoiseProcess, c: float) -> None:
    t = TIMESTEPS[process].double().numpy() * (1000 if process is FLOW else 1)
    alpha = -math.log(c) / 1000
    found = thresholds(process, TIMESTEPS[process], huber_schedule="exponential", huber_c=c, huber_scale=1.7)
    np.testing.assert_allclose(found, np.exp(-alpha * t) * 1.7, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_threshold_by_snr_falls_with_the_noise_and_reads_no_scale(process: NoiseProcess, scale: float) -> None:
    found = thresholds(process, TIMESTEPS[process], huber_c=0.2, huber_scale=scale)
    np.testing.assert_allclose(found, 0.8 / (1 + sigma_of(process)) ** 2 + 0.2, rtol=1e-4)


def test_a_constant_threshold_is_c_times_its_scale(process: NoiseProcess) -> None:
    found = thresholds(process, TIMESTEPS[process], huber_schedule="constant", huber_c=0.3, huber_scale=2.0)
    np.testing.assert_allclose(found, np.full(5, 0.6), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_thresholds_are_positive_and_finite_where_no_picture_is_left(schedule: str) -> None:
    for process, last in ((FLOW, torch.ones(1)), (ENDS_IN_NOISE, torch.tensor([999]))):
        found = thresholds(process, last, huber_schedule=schedule)
        assert np.isfinite(found).all() and (found > 0).all()


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_other_losses_have_no_threshold(loss_type: str) -> None:
    assert huber_thresholds(BETAS, TIMESTEPS[BETAS], LossOptions(loss_type=loss_type)) is None  # pyright: ignore[reportArgumentType]


@given(c=st.floats(1e-3, 10), difference=st.floats(-50, 50), is_smooth=st.booleans())
@settings(max_examples=60, deadline=None)
def test_errors_follow_their_formulas(c: float, difference: float, is_smooth: bool) -> None:
    c, difference = float(np.float32(c)), float(np.float32(difference))
    guess, target = torch.full((1, 4, 2, 2), difference), torch.zeros(1, 4, 2, 2)
    options = LossOptions(loss_type="smooth_l1" if is_smooth else "huber")
    found = weigh(guess, target, torch.ones(1), options, thresholds=torch.tensor([c])).item()
    expected = 2 * (math.sqrt(difference**2 + c**2) - c) * (1 if is_smooth else c)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_every_sample_has_its_own_threshold() -> None:
    guess, target, c = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.tensor([0.05, 0.5, 5.0])
    options, weights = LossOptions(loss_type="huber"), torch.tensor([1.0, 0.5, 2.0])
    alone = [weigh(guess[[i]], target[[i]], weights[[i]], options, thresholds=c[[i]]) for i in range(3)]
    torch.testing.assert_close(weigh(guess, target, weights, options, thresholds=c), torch.cat(alone))


def test_a_high_threshold_squares_and_a_low_one_takes_the_size() -> None:
    guess, target = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    ones = torch.ones(2)
    high = weigh(guess, target, ones, LossOptions(loss_type="huber"), thresholds=1000 * ones)
    low = weigh(guess, target, ones, LossOptions(loss_type="smooth_l1"), thresholds=1e-6 * ones)
    torch.testing.assert_close(high, weigh(guess, target, ones, LossOptions()), rtol=1e-4, atol=0)
    torch.testing.assert_close(low, 2 * weigh(guess, target, ones, LossOptions(loss_type="l1")), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_a_perfect_guess_has_neither_loss_nor_gradient(loss_type: str) -> None:
    guess = torch.randn(2, 4, 3, 3).requires_grad_()
    loss = weigh(guess, guess.detach().clone(), torch.ones(2), LossOptions(loss_type=loss_type), thresholds=torch.full((2,), 1e-3)).mean()  # pyright: ignore[reportArgumentType]
    loss.backward()
    assert loss == 0 and guess.grad is not None and bool((guess.grad == 0).all())


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_a_mask_acts_on_robust_losses(loss_type: str) -> None:
    options, c, mask = LossOptions(loss_type=loss_type), torch.tensor([0.1, 0.2]), torch.zeros(2, 1, 4, 4)  # pyright: ignore[reportArgumentType]
    guess, target = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    mask[..., :2] = 0.5
    half = weigh(guess[..., :2], target[..., :2], torch.ones(2), options, thresholds=c)
    torch.testing.assert_close(weigh(guess, target, torch.ones(2), options, mask, thresholds=c), half / 4)


@pytest.mark.parametrize("name", ["huber_c", "huber_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_thresholds_that_are_not_positive_are_refused(name: str, value: float) -> None:
    (problem,) = LossOptions(**{name: value}).check()  # pyright: ignore[reportArgumentType]
    assert problem.startswith(f"--{name} {value:g}: ")


@pytest.mark.parametrize(
    ("given", "in_vain"),
    [
        (["--huber_c", "0.2"], ["huber_c"]),
        (["--huber_schedule", "constant", "--huber_scale", "2", "--loss_type", "l1"], ["huber_schedule", "huber_scale"]),
        (["--loss_type", "huber", "--huber_scale", "2"], ["huber_scale"]),
        (["--loss_type", "smooth_l1", "--huber_schedule", "exponential", "--huber_scale", "2", "--huber_c", "0.2"], []),
    ],
)
def test_options_of_the_threshold_are_in_vain_where_nothing_reads_them(given: list[str], in_vain: list[str]) -> None:
    options = parse_command_line([LossOptions], given, prog="test", about="test")
    assert [sentence.split(" ")[0][2:] for sentence in without_effect(options, LossOptions.RULES)] == in_vain
