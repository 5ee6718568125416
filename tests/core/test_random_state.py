"""The global generators are put back."""

import random

import numpy as np
import pytest
import torch

from library.core.random_state import kept_random_state


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_within_changes_nothing_after_it(fails: bool) -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    expected = draws()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    try:
        with kept_random_state(torch.device("cpu")):
            assert draws() == expected
            torch.manual_seed(8)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert draws() == expected
