"""The mean of a step is over real batches, whatever fills up the last turn of the ranks."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from library.training.parallel.shares import counted


def at(*positions: int) -> list[Any]:
    return cast(list[Any], [SimpleNamespace(position=position) for position in positions])


@pytest.mark.parametrize("accumulated", [1, 3])
def test_one_process_counts_its_batches(accumulated: int) -> None:
    assert counted(at(*range(accumulated)), 10, 1) == accumulated


@pytest.mark.parametrize("rank", range(4))
def test_a_full_turn_counts_one(rank: int) -> None:
    assert counted(at(4 + rank), 8, 4) == 1


@pytest.mark.parametrize("rank", range(4))
def test_in_the_last_turn_real_batches_count_for_the_copies(rank: int) -> None:
    losses = [0.5, 0.25, 0.0, 0.0]  # of copies zero
    shares = [loss / counted(at(8 + rank), 10, 4) for loss in losses]
    assert sum(shares) / 4 == (0.5 + 0.25) / 2


def test_copies_within_an_accumulated_step_do_not_count() -> None:
    assert counted(at(0, 2), 3, 2) == counted(at(1, 3), 3, 2) == 1.5
