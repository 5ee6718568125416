"""From batches to a `DataLoader`: the positions of a rank, read by worker processes that draw nothing of their own."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from library.core.keyed_random import keyed_seed
from library.data.batch import Batch
from library.data.dataset import BatchDataset, TrainingData
from library.data.options import DataOptions


def batch_loader(
    data: TrainingData, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1, epochs: int = 1, workers: int = 0
) -> DataLoader[Batch]:
    """A loader over `BatchDataset` that draws nothing from the global random state, in this process or in the workers.

    With `epochs` > 1 the same workers go on from one epoch to the next (`--persistent_data_loader_workers`).
    """
    return BatchLoader(
        BatchesOrErrors(BatchDataset(data, epoch, start=start, rank=rank, world=world, epochs=epochs)),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        generator=torch.Generator().manual_seed(keyed_seed(data.seed, "loader", epoch)),
    )


class BatchesOrErrors(Dataset[Any]):
    """Batches, or the `ValueError` that one ended in: torch would bury it under the traceback of its worker process."""

    def __init__(self, batches: BatchDataset) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch | ValueError:
        try:
            return self.batches[index]
        except ValueError as error:
            return ValueError(str(error))


class BatchLoader(DataLoader[Batch]):
    """A `DataLoader` that raises the errors of `BatchesOrErrors` as they were."""

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for item in super().__iter__():
            if isinstance(item, ValueError):
                raise item
            yield item


def worker_count(options: DataOptions) -> int:
    """How many processes read images: as asked, but at most one a processor."""
    return min(options.max_data_loader_n_workers, os.cpu_count() or 1)


def _as_is(batch: Any) -> Any:
    return batch
