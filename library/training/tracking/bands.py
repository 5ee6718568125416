"""Losses by timestep: which part of the noise process learns."""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

EDGES = (0, 250, 500, 750, 1000)  # per mille of the noise process's range: 0 is the picture, 1000 the noise
NAMES = tuple(f"{low}-{high}" for low, high in pairwise(EDGES))


def band_sums(losses: Tensor, timesteps: Tensor, counted: Tensor) -> Tensor:
    """Sums and numbers of losses (batch,) in each band, (2, bands) float32 on their device.

    `timesteps` (batch,) are counted from 0 to 1000; `counted` (batch,) bool are the samples that count.
    """
    places = (timesteps * len(NAMES) / EDGES[-1]).long().clamp(0, len(NAMES) - 1)
    members = (places[:, None] == torch.arange(len(NAMES), device=places.device)) & counted[:, None]
    return torch.stack([(losses.detach()[:, None] * members).sum(0), members.sum(0)])


class BandMeans:
    """Running means of the bands over the last `window` readings."""

    def __init__(self, window: int) -> None:
        self._readings: deque[list[float]] = deque(maxlen=max(1, window))

    def add(self, reading: Sequence[float]) -> None:
        """Count a reading: the sums of the bands, then their numbers, of all ranks."""
        self._readings.append(list(reading))

    def figures(self) -> dict[str, float]:
        """`loss/band/<from>-<to>` by tracker key; a band that no sample fell into is left out."""
        totals = [sum(values) for values in zip(*self._readings, strict=True)]
        return band_figures("loss/band", totals)

    def state_dict(self) -> list[list[float]]:
        """The readings, for a saved state."""
        return [list(reading) for reading in self._readings]

    def load_state_dict(self, readings: Sequence[Sequence[float]]) -> None:
        """Go on with the readings of a saved state."""
        self._readings = deque(map(list, readings), maxlen=self._readings.maxlen)


def band_figures(key: str, totals: Sequence[float]) -> dict[str, float]:
    """Means by tracker key of sums and numbers, as `band_sums` gives them in one row; without the bands that nothing fell into."""
    sums, counts = totals[: len(NAMES)], totals[len(NAMES) :]
    return {f"{key}/{name}": value / number for name, value, number in zip(NAMES, sums, counts, strict=True) if number}
