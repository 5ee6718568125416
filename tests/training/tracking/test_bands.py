"""Losses by timestep."""

import pytest
import torch

from library.training.tracking.bands import NAMES, BandMeans, band_figures, band_sums


def sums_of(*pairs: tuple[float, float], counted: list[bool] | None = None) -> list[float]:
    losses, timesteps = (torch.tensor(column) for column in zip(*pairs, strict=True))
    which = torch.tensor(counted or [True] * len(pairs))
    return band_sums(losses, timesteps, which).flatten().tolist()


def test_there_are_four_bands_of_a_quarter_each() -> None:
    assert NAMES == ("0-250", "250-500", "500-750", "750-1000")


@pytest.mark.parametrize(("timestep", "band"), [(0.0, 0), (249.9, 0), (250.0, 1), (500.0, 2), (749.0, 2), (999.0, 3), (1000.0, 3)])
def test_a_timestep_falls_into_its_band(timestep: float, band: int) -> None:
    expected = [0.0] * 8
    expected[band], expected[4 + band] = 2.0, 1.0
    assert sums_of((2.0, timestep)) == expected


def test_samples_that_only_fill_up_do_not_count() -> None:
    assert sums_of((2.0, 10.0), (5.0, 20.0), counted=[True, False]) == sums_of((2.0, 10.0))


def test_sums_carry_no_gradient() -> None:
    losses = torch.ones(2, requires_grad=True) * 2
    assert not band_sums(losses, torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bool)).requires_grad


def test_a_band_without_samples_has_no_figure() -> None:
    assert band_figures("loss/band", sums_of((2.0, 10.0), (4.0, 20.0), (1.0, 900.0))) == {"loss/band/0-250": 3.0, "loss/band/750-1000": 1.0}


def test_means_run_over_the_last_readings_and_weigh_each_sample_alike() -> None:
    means = BandMeans(2)
    for reading in (sums_of((100.0, 0.0)), sums_of((1.0, 0.0), (1.0, 0.0), (1.0, 0.0)), sums_of((5.0, 0.0))):
        means.add(reading)
    assert means.figures() == {"loss/band/0-250": 2.0}


def test_a_saved_state_goes_on_as_it_was() -> None:
    first, second = BandMeans(3), BandMeans(3)
    first.add(sums_of((1.0, 0.0), (3.0, 600.0)))
    second.load_state_dict(first.state_dict())
    for means in (first, second):
        means.add(sums_of((2.0, 0.0)))
    assert second.figures() == first.figures()
