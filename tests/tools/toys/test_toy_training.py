"""What the toy trainings share: schedules, averages, runs that are taken up again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tools.toys.training import Average, Run, warm_cosine, warm_hold_fall


def test_a_held_rate_does_not_know_the_number_of_steps_before_it_falls() -> None:
    rates = [[warm_hold_fall(step, steps, 10, 50) for step in range(150)] for steps in (200, 1000)]
    assert rates[0] == rates[1]


def test_a_held_rate_warms_up_and_falls_to_nothing() -> None:
    assert warm_hold_fall(0, 200, 10, 50) == 0.1
    assert warm_hold_fall(100, 200, 10, 50) == 1
    assert warm_hold_fall(175, 200, 10, 50) == pytest.approx(0.5)
    assert warm_hold_fall(200, 200, 10, 50) == 0


def test_a_cosine_rate_is_half_in_the_middle() -> None:
    assert abs(warm_cosine(60, 110, 10) - 0.5) < 1e-9


def test_a_run_is_taken_up_where_it_was_saved(tmp_path: Path) -> None:
    def run() -> Run:
        networks = nn.ModuleDict({"one": nn.Linear(2, 2)})
        return Run(path=tmp_path / "run.pt", networks=networks, optimizer=torch.optim.SGD(networks.parameters(), lr=0.1))

    first, second = run(), run()
    first.note(3.0)
    first.save()
    second.resume()
    assert (second.step, second.loss) == (1, 3.0)
    for own, saved in zip(second.networks.parameters(), first.networks.parameters(), strict=True):
        assert torch.equal(own, saved)


@torch.no_grad()
def test_an_average_stands_in_for_a_while() -> None:
    network = nn.Linear(2, 2)
    average, own = Average(network, 0.9), network.weight.clone()
    network.weight.add_(1)
    with average.standing_in(network):
        assert torch.equal(network.weight, own)
    assert torch.equal(network.weight, own + 1)
