"""The flow against its formulas: places, weights, sampling."""

import math

import pytest
import torch
from torch import Tensor

from library.core.command_line import parse_command_line
from library.core.rules import without_effect
from library.diffusion.flow import FlowOptions, FlowProcess, flux_shift, shifted

SHAPE = (20000, 16, 64, 48)


def places(**options: object) -> Tensor:
    process = FlowProcess(FlowOptions(**options))  # pyright: ignore[reportArgumentType]
    return process.timesteps(SHAPE, torch.Generator().manual_seed(0)).double()


def test_noisy_latents_lie_on_the_line_and_the_target_is_its_direction() -> None:
    process, latents, noise = FlowProcess(), torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    s = torch.tensor([0.0, 0.25])
    noisy = process.corrupt(latents, noise, s)
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    torch.testing.assert_close(process.target(latents, noise, s), noise - latents)


def test_uniform_places_are_uniform_and_never_zero() -> None:
    s = places(timestep_sampling="uniform")
    assert abs(s.mean() - 0.5) < 0.01 and abs(s.var() - 1 / 12) < 0.002 and s.min() > 0 and s.max() <= 1


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_sigmoid_places_are_the_sigmoid_of_a_normal_number(scale: float) -> None:
    z = torch.logit(places(sigmoid_scale=scale))
    assert abs(z.mean()) < 0.03 * scale and abs(z.std() - scale) < 0.02 * scale


def test_shift_moves_the_sigmoid_places_by_its_formula() -> None:
    s = places()
    torch.testing.assert_close(places(timestep_sampling="shift", discrete_flow_shift=3.0), 3 * s / (1 + 2 * s), rtol=1e-5, atol=1e-7)


def test_the_shift_has_no_part_in_plain_sigmoid_places() -> None:
    assert torch.equal(places(discrete_flow_shift=3.0), places())


@pytest.mark.parametrize(("side", "mu"), [(32, 0.5), (128, 1.15)])  # 16x16 and 64x64 patches
def test_flux_shift_grows_with_the_picture(side: int, mu: float) -> None:
    assert math.log(flux_shift((1, 16, side, side))) == pytest.approx(mu)


def test_flux_shift_places_follow_their_formula() -> None:
    s, k = places(), flux_shift(SHAPE)
    torch.testing.assert_close(places(timestep_sampling="flux_shift"), k / (k + 1 / s - 1), rtol=1e-5, atol=1e-7)


def test_sigma_places_come_from_a_table_of_1000_shifted_steps() -> None:
    s = places(timestep_sampling="sigma", discrete_flow_shift=3.0)
    table = shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000, 3.0)
    nearest = (s[:200, None] - table).abs().min(dim=1).values
    assert nearest.max() < 1e-6 and abs(s.mean() - table.mean()) < 0.01


def test_sigma_with_logit_normal_has_the_density_of_its_normal_number() -> None:
    s = places(timestep_sampling="sigma", weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.7)
    z = torch.logit((1 - s).clamp(1e-3, 1 - 1e-3))  # index 0 of the table is the noise
    assert abs(z.mean() - 0.5) < 0.02 and abs(z.std() - 0.7) < 0.02


@pytest.mark.parametrize("mean", [-50.0, 50.0])
def test_an_extreme_logit_mean_stays_inside_the_table(mean: float) -> None:
    s = places(timestep_sampling="sigma", weighting_scheme="logit_normal", logit_mean=mean)
    assert torch.isfinite(s).all() and s.min() >= 1 / 1000 and s.max() <= 1


def test_sigma_with_mode_draws_by_the_mode_density() -> None:
    scale = 1.29
    u = torch.linspace(0, 1, 100001, dtype=torch.float64)
    expected = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    s = places(timestep_sampling="sigma", weighting_scheme="mode", mode_scale=scale)
    quantiles = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    torch.testing.assert_close(torch.quantile(1 - s, quantiles), torch.quantile(expected, quantiles), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [("sigma_sqrt", 16.0), ("cosmap", 2 / (math.pi * (1 - 0.5 + 0.125))), ("none", 1.0), ("uniform", 1.0), ("mode", 1.0)],
)
def test_loss_weights_follow_their_formulas(scheme: str, weight: float) -> None:
    process = FlowProcess(FlowOptions(weighting_scheme=scheme))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(process.loss_weights(torch.tensor([0.25])), torch.tensor([weight]))


@pytest.mark.parametrize("sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
def test_every_sampling_keeps_to_the_range_of_timesteps(sampling: str) -> None:
    s = places(timestep_sampling=sampling, min_timestep=250, max_timestep=500)
    assert s.min() >= 0.25 and s.max() <= 0.5 and s.std() > 0.02


def test_places_are_counted_from_0_to_1000_and_know_their_noise() -> None:
    s = torch.tensor([0.0, 0.25, 0.999, 1.0])
    torch.testing.assert_close(FlowProcess().counted(s), 1000 * s)
    torch.testing.assert_close(FlowProcess().sigmas(s), torch.tensor([0.0, 1 / 3, 999.0, math.inf]), rtol=1e-4, atol=0)


def test_eulers_method_finds_the_picture_that_a_perfect_denoiser_knows() -> None:
    torch.manual_seed(0)
    picture, latents = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    noise, scheduler = latents.clone(), FlowProcess().sampler("euler", 7, 5.0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(noise - picture, timestep, scheduler.scale_model_input(latents, timestep)).prev_sample
    torch.testing.assert_close(latents, picture, rtol=0, atol=1e-5)


def test_the_sampler_takes_shifted_steps_from_one_to_zero() -> None:
    s = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(FlowProcess().sampler("euler", 4, 5.0).timesteps, 5 * s / (1 + 4 * s))


@pytest.mark.parametrize(("name", "shift"), [("ddim", 1.0), ("euler", 0.0), ("euler", -2.0)])
def test_what_a_flow_has_not_is_refused(name: str, shift: float) -> None:
    with pytest.raises(ValueError, match="sampler ddim|flow shift"):
        FlowProcess().sampler(name, 4, shift)


@pytest.mark.parametrize("name", ["discrete_flow_shift", "sigmoid_scale", "logit_std"])
@pytest.mark.parametrize("value", [0.0, math.inf])
def test_a_shift_or_deviation_is_positive_and_finite(name: str, value: float) -> None:
    (problem,) = FlowOptions(**{name: value}).check()  # pyright: ignore[reportArgumentType]
    assert problem == f"--{name} {value:g}: must be more than 0 and finite"


IN_VAIN = {
    "noise_offset_random_strength": [],
    "multires_noise_discount": ["0.5"],
    "ip_noise_gamma_random_strength": [],
    "discrete_flow_shift": ["3"],
    "sigmoid_scale": ["2", "--timestep_sampling", "uniform"],
    "weighting_scheme": ["mode"],
    "logit_mean": ["1", "--timestep_sampling", "sigma"],
    "logit_std": ["2", "--weighting_scheme", "logit_normal"],
    "mode_scale": ["1", "--timestep_sampling", "sigma", "--weighting_scheme", "logit_normal"],
}


@pytest.mark.parametrize("rule", FlowOptions.RULES, ids=lambda rule: rule.option)
def test_an_option_of_another_way_to_draw_is_said_to_be_in_vain(rule: object) -> None:
    name = rule.option  # pyright: ignore[reportAttributeAccessIssue]
    options = parse_command_line([FlowOptions], [f"--{name}", *IN_VAIN[name]], prog="test", about="test")
    assert any(sentence.startswith(f"--{name} has no effect: ") for sentence in without_effect(options, FlowOptions.RULES))


def test_options_that_belong_together_are_not_in_vain() -> None:
    given = ["--timestep_sampling", "sigma", "--weighting_scheme", "logit_normal", "--logit_mean", "1", "--discrete_flow_shift", "3"]
    options = parse_command_line([FlowOptions], given, prog="test", about="test")
    assert list(without_effect(options, FlowOptions.RULES)) == []
