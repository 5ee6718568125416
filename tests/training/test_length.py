"""How long a run is, from its start and from where it goes on."""

import pytest

from library.training.length import Length


@pytest.mark.parametrize(("step", "epoch", "made"), [(0, 1, 0), (3, 1, 3), (10, 1, 10), (10, 2, 0), (27, 3, 7), (35, 4, 5)])
def test_a_run_that_stands_where_its_steps_say_ends_where_it_would(step: int, epoch: int, made: int) -> None:
    length = Length(steps_per_epoch=10, steps=35)
    assert length.seen_from(step, epoch, made).epochs == length.epochs == 4


@pytest.mark.parametrize(
    ("step", "epoch", "made", "epochs"),
    [
        (12, 4, 0, 6),  # of 4 steps an epoch until now: 28 to go, 3 epochs of 10
        (20, 2, 5, 4),  # of 15 and more: 20 to go, 5 of them in this epoch, then 10 and 5
        (40, 2, 0, 1),  # nothing to go
    ],
)  # fmt: skip
def test_a_run_whose_epochs_were_others_has_as_many_as_its_steps_take(step: int, epoch: int, made: int, epochs: int) -> None:
    assert Length(steps_per_epoch=10, steps=40).seen_from(step, epoch, made).epochs == epochs
