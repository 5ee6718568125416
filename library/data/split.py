"""Which images are held out for validation, as a pure function of their names."""

from collections.abc import Sequence

from library.core.keyed_random import keyed_seed


def split(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The names that are held out: those that rank first when each is hashed with the seed, `fraction` of them all.

    Their order does not matter. A larger fraction holds out a superset, and a name that is added or removed moves at most one other.
    Between 0 and 1 at least one name is held out and at least one kept, where there are two or more; a lone name is kept.
    """
    assert 0 <= fraction <= 1, "the reader checks it"
    ranked = sorted(set(names), key=lambda name: (keyed_seed(seed, "validation", ascii(name)), name))  # not every file name is UTF-8
    return set(ranked[: _held_out(len(ranked), fraction)])


def _held_out(count: int, fraction: float) -> int:
    if fraction in (0, 1) or count < 2:
        return count if fraction == 1 else 0
    return min(max(int(fraction * count + 0.5), 1), count - 1)
