"""Pictures that are the same or nearly so, among 10,000s of them in seconds: blocks of XOR and bit counts over fingerprints."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from library.data.inspection.fingerprints import PATCH, Fingerprint

NEAR_BITS = 12  # of 64 that may differ
NEAR_TONES = 8.0  # mean difference of two patches, of 255
BLOCK = 512  # rows compared at a time: 512 x 10,000 comparisons take 40 MB


@dataclass(frozen=True)
class Group:
    """Pictures that belong together, by their positions in ascending order; all the same file, or look alike in a chain."""

    members: tuple[int, ...]


class Prints:
    """Many fingerprints as arrays: about 200 bytes a picture."""

    def __init__(self, prints: Sequence[Fingerprint]) -> None:
        self.bits = np.array([each.bits for each in prints], dtype=np.uint64)
        self.mirrored = np.array([each.mirrored for each in prints], dtype=np.uint64)
        self.patches = np.array([each.patch for each in prints], dtype=np.uint8).reshape(len(prints), PATCH, PATCH, 3)

    def __len__(self) -> int:
        return len(self.bits)

    def are_alike(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs of positions look alike, plain or mirrored, (pairs,) bool."""
        alike = np.zeros(len(first), dtype=bool)
        for bits, step in ((self.bits, 1), (self.mirrored, -1)):
            near = np.bitwise_count(self.bits[first] ^ bits[second]) <= NEAR_BITS
            tones = np.abs(self.patches[first[near]].astype(np.int16) - self.patches[second[near]][:, :, ::step])
            alike[near] |= tones.mean(axis=(1, 2, 3)) <= NEAR_TONES
        return alike


def same_groups(hashes: Sequence[str]) -> list[Group]:
    """The positions of equal hashes, two or more each."""
    places: dict[str, list[int]] = {}
    for position, each in enumerate(hashes):
        places.setdefault(each, []).append(position)
    return [Group(tuple(members)) for members in places.values() if len(members) > 1]


def near_groups(prints: Prints) -> list[Group]:
    """The positions of pictures that look alike, directly or through others, two or more each."""
    labels = np.arange(len(prints))
    for start in range(0, len(prints), BLOCK):
        first, second = _near_pairs(prints, start)
        if len(first):
            labels = _joined(labels, first, second)
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(position)
    return [Group(tuple(each)) for each in members.values() if len(each) > 1]


def crossing_pairs(prints: Prints, group: Group, inside: set[int]) -> list[tuple[int, int]]:
    """Each member of a group that is one of `inside`, with the first of the others that it looks like directly, if there is one."""
    others = np.array([other for other in group.members if other not in inside], dtype=np.int64)
    found = ((one, _first_alike(prints, one, others)) for one in group.members if one in inside)
    return [(one, other) for one, other in found if other is not None]


def _first_alike(prints: Prints, one: int, others: np.ndarray) -> int | None:
    for some in (others[start : start + BLOCK] for start in range(0, len(others), BLOCK)):
        alike = prints.are_alike(np.full(len(some), one), some)
        if alike.any():
            return int(some[alike.argmax()])
    return None


def _near_pairs(prints: Prints, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of one block of rows with all pictures from it on."""
    rows = prints.bits[start : start + BLOCK, None]
    near = np.bitwise_count(rows ^ prints.bits[None, start:]) <= NEAR_BITS
    near |= np.bitwise_count(rows ^ prints.mirrored[None, start:]) <= NEAR_BITS
    first, second = np.nonzero(np.triu(near, 1))
    first, second = first + start, second + start
    keep = np.concatenate([prints.are_alike(first[n : n + 65536], second[n : n + 65536]) for n in range(0, len(first), 65536)] or [[]])
    keep = keep.astype(bool)
    return first[keep], second[keep]


def _joined(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Labels after the pairs are joined: the same for all that hang together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(labels)
    rows, columns = np.concatenate([first, np.arange(count)]), np.concatenate([second, labels])
    edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(count, count))
    return _first_of(connected_components(edges, directed=False)[1])


def _first_of(components: np.ndarray) -> np.ndarray:
    """Component numbers as the position of their first member, which is a label that may stand in edges."""
    _, first, inverse = np.unique(components, return_index=True, return_inverse=True)
    return first[inverse]
