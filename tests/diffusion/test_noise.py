"""Noise that is shaped, against its formulas written anew, and draw by draw."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.core.command_line import parse_command_line
from library.core.rules import without_effect
from library.diffusion.noise import NoiseOptions, perturbed, shaped

SHAPE = (4, 24, 16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def shape_it(seed: int = 0, latents: Tensor | None = None, **options: object) -> Tensor:
    chosen = NoiseOptions(**options)  # pyright: ignore[reportArgumentType]
    assert not list(chosen.check())
    return shaped(normal(1), normal(2) if latents is None else latents, chosen, torch.Generator().manual_seed(seed))


def test_plain_noise_comes_back_as_it_is_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, before = normal(1), generator.get_state()
    assert shaped(noise, normal(2), NoiseOptions(), generator) is noise and perturbed(noise, NoiseOptions(), generator) is noise
    assert torch.equal(generator.get_state(), before)


# Offset


def test_an_offset_adds_one_normal_number_a_channel() -> None:
    added = shape_it(noise_offset=0.1) - normal(1)
    numbers = torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(added, (0.1 * numbers).expand(SHAPE), rtol=0, atol=1e-6)


def test_a_random_strength_is_even_between_0_and_the_offset() -> None:
    ratios = [shape_it(seed, noise_offset=0.5, noise_offset_random_strength=True) - normal(1) for seed in range(400)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    strengths = [float(torch.rand((), generator=generator)) for generator in generators]
    numbers = [float(torch.randn(4, 1, 1, generator=generator)[0]) for generator in generators]
    found = [float(ratio[0, 0, 0]) for ratio in ratios]
    np.testing.assert_allclose(found, 0.5 * np.array(strengths) * np.array(numbers), atol=1e-6)
    assert abs(np.mean(strengths) - 0.5) < 0.05 and min(strengths) >= 0 and max(strengths) <= 1


@given(offset=st.floats(0, 1), scale=st.floats(-2, 2), level=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_an_adaptive_offset_grows_with_the_mean_of_its_channel(offset: float, scale: float, level: float) -> None:
    latents = torch.stack([torch.full(SHAPE[1:], level), *normal(2)[1:].double().float()])
    numbers = torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    means = latents.double().mean((1, 2), keepdim=True).abs()
    expected = normal(1).double() + (offset + scale * means).clamp(min=0) * numbers
    found = shape_it(latents=latents, noise_offset=offset, adaptive_noise_scale=scale)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


# Pyramid


def pyramid(seed: int, iterations: int, discount: float) -> Tensor:
    """The levels added one by one in float64, by hand."""
    generator, total = torch.Generator().manual_seed(seed), normal(1).double()
    height, width = SHAPE[1:]
    for level in range(iterations):
        r = 2 + 2 * torch.rand((), generator=generator).item()
        h, w = max(1, int(height / r**level)), max(1, int(width / r**level))
        small = torch.randn(1, 4, h, w, generator=generator).double()
        total = total + discount**level * F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0]
        if h == 1 or w == 1:
            break
    centred = total - total.mean()
    return total / (centred.square().sum() / (total.numel() - 1)).sqrt()


@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (3, 0.3), (10, 0.8), (6, 0.0)])
def test_a_pyramid_is_the_sum_of_its_levels_at_deviation_1(iterations: int, discount: float) -> None:
    for seed in range(5):
        found = shape_it(seed, multires_noise_iterations=iterations, multires_noise_discount=discount)
        torch.testing.assert_close(found.double(), pyramid(seed, iterations, discount), rtol=0, atol=1e-5)
        assert float(found.std()) == pytest.approx(1, abs=1e-5)


def test_a_pyramid_has_more_of_low_frequencies() -> None:
    def low(noise: Tensor) -> float:
        return float(F.avg_pool2d(noise[None], 8).var())

    tall = [low(shape_it(seed, multires_noise_iterations=8, multires_noise_discount=0.8)) for seed in range(20)]
    assert np.mean(tall) > 5 * low(normal(1))


# Input perturbation


def test_the_input_has_gamma_times_more_noise_and_the_target_has_not() -> None:
    options = NoiseOptions(ip_noise_gamma=0.1)
    generator = torch.Generator().manual_seed(0)
    target = shaped(normal(1), normal(2), options, generator)
    mixed_in = perturbed(target, options, generator)
    assert torch.equal(target, normal(1))
    torch.testing.assert_close(mixed_in, normal(1) + 0.1 * normal(0), rtol=0, atol=1e-6)


def test_a_random_gamma_is_even_between_0_and_the_gamma() -> None:
    options = NoiseOptions(ip_noise_gamma=0.4, ip_noise_gamma_random_strength=True)
    found = [float((perturbed(normal(1), options, torch.Generator().manual_seed(seed)) - normal(1)).std()) for seed in range(300)]
    assert abs(np.mean(found) - 0.2) < 0.02 and max(found) < 0.42 and min(found) < 0.02


# What is wrong, and what is in vain


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--max_timestep 500"),
        ({"min_timestep": -1}, "--min_timestep -1"),
        ({"max_timestep": 1001}, "--max_timestep 1001"),
        ({"noise_offset": -0.1}, "--noise_offset -0.1"),
        ({"noise_offset": math.inf}, "--noise_offset inf"),
        ({"multires_noise_iterations": -1}, "--multires_noise_iterations -1"),
        ({"multires_noise_iterations": 2, "multires_noise_discount": -0.5}, "--multires_noise_discount -0.5"),
        ({"ip_noise_gamma": -1.0}, "--ip_noise_gamma -1"),
        ({"adaptive_noise_scale": 0.1}, "--adaptive_noise_scale: changes --noise_offset, which is not given"),
        ({"adaptive_noise_scale": math.inf, "noise_offset": 0.1}, "--adaptive_noise_scale inf"),
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "--noise_offset and --multires_noise_iterations"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, named: str) -> None:
    (problem,) = NoiseOptions(**options).check()
    assert problem.startswith(named)


def test_zeros_turn_everything_off_and_contradict_nothing() -> None:
    zeros = {"noise_offset": 0.0, "adaptive_noise_scale": 0.0, "multires_noise_iterations": 6, "ip_noise_gamma": 0.0}
    assert list(NoiseOptions(**zeros).check()) == []
    assert torch.equal(shape_it(noise_offset=0.0, multires_noise_iterations=0, adaptive_noise_scale=0.0), normal(1))


IN_VAIN = {
    "noise_offset_random_strength": [],
    "multires_noise_discount": ["0.5"],
    "ip_noise_gamma_random_strength": ["--ip_noise_gamma", "0"],
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_an_option_without_the_one_that_it_changes_is_said_to_be_in_vain(name: str) -> None:
    options = parse_command_line([NoiseOptions], [f"--{name}", *IN_VAIN[name]], prog="test", about="test")
    assert [sentence.split(":")[0] for sentence in without_effect(options, NoiseOptions.RULES)] == [f"--{name} has no effect"]


def test_options_with_the_one_that_they_change_are_not_in_vain() -> None:
    given = ["--noise_offset", "0.1", "--noise_offset_random_strength", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"]
    options = parse_command_line([NoiseOptions], given, prog="test", about="test")
    assert list(without_effect(options, NoiseOptions.RULES)) == []
