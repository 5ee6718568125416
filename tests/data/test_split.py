"""Which images are held out: the same everywhere, exactly as many as asked, and steady when a folder grows."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.split import split

NAMES = st.lists(st.text(max_size=8), unique=True, max_size=40)
FRACTIONS = st.floats(0, 1)
SEEDS = st.integers(0, 2**63 - 1)


@given(NAMES, FRACTIONS, SEEDS)
def test_the_share_is_exact_and_neither_side_empty(names: list[str], fraction: float, seed: int) -> None:
    held = split(names, fraction, seed)
    assert held <= set(names)
    assert abs(len(held) - fraction * len(names)) <= 0.5 or len(held) in (1, len(names) - 1)
    if len(names) > 1 and 0 < fraction < 1:
        assert 0 < len(held) < len(names)


@given(NAMES, FRACTIONS, SEEDS, st.randoms())
def test_the_order_of_the_names_does_not_matter(names: list[str], fraction: float, seed: int, random) -> None:
    shuffled = random.sample(names, len(names))
    assert split(names, fraction, seed) == split(shuffled, fraction, seed)


@given(NAMES, FRACTIONS, FRACTIONS, SEEDS)
def test_a_larger_fraction_holds_out_a_superset(names: list[str], one: float, other: float, seed: int) -> None:
    assert split(names, min(one, other), seed) <= split(names, max(one, other), seed)


@given(NAMES.filter(lambda names: len(names) > 2), FRACTIONS, SEEDS)
def test_a_new_image_moves_at_most_one_other(names: list[str], fraction: float, seed: int) -> None:
    new, *old = names
    moved = (split(old, fraction, seed) ^ split(names, fraction, seed)) - {new}
    assert len(moved) <= 1


@given(NAMES, SEEDS)
def test_nothing_and_everything(names: list[str], seed: int) -> None:
    assert split(names, 0, seed) == set()
    assert split(names, 1, seed) == set(names)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_lone_image_is_trained_on(fraction: float) -> None:
    assert split(["only"], fraction, 1) == set()


def test_the_counts_where_sd_scripts_overlaps() -> None:
    names = [f"{n}.png" for n in range(11)]
    assert len(split(names, 0.25, 1)) == 3  # of 11: it trains on 9 and validates on 3


def test_seeds_hold_out_different_images() -> None:
    names = [f"{n}.png" for n in range(30)]
    assert len({frozenset(split(names, 0.3, seed)) for seed in range(10)}) == 10


def test_every_image_is_as_likely_as_the_others() -> None:
    names = [f"{n}.png" for n in range(10)]
    counts = [sum(name in split(names, 0.3, seed) for seed in range(500)) for name in names]
    assert all(110 < count < 190 for count in counts)  # 150 +- 4 deviations of 10


@pytest.mark.slow
def test_another_process_holds_out_the_same() -> None:
    program = "from library.data.split import split; print(sorted(split([str(n) for n in range(50)], 0.2, 3)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"})
    assert done.stdout.strip() == str(sorted(split([str(n) for n in range(50)], 0.2, 3)))


def test_names_that_are_no_utf_8_can_be_held_out() -> None:
    names = [f"\udcff{n}.png" for n in range(4)]  # as Python reads such a file name
    assert len(split(names, 0.5, 1)) == 2
