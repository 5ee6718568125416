"""From batches to a `DataLoader`: the positions of a rank, read by worker processes that draw nothing of their own."""

import os
import signal
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

    With `epochs` > 1 the same workers go on from one epoch to the next (`--persistent_data_loader_workers`). Each worker reads up to
    two batches ahead. For a GPU batches are put into pinned memory, out of which a step copies while the GPU computes.
    """
    return BatchLoader(
        BatchesOrErrors(BatchDataset(data, epoch, start=start, rank=rank, world=world, epochs=epochs)),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=_leave_interrupts,
        pin_memory=torch.cuda.is_available(),
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
    """How many processes read images: as asked, but at most one a processor that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(options.max_data_loader_n_workers, usable)


def workers_for(data: TrainingData) -> int:
    """How many processes put batches together: none where no file is read for them."""
    return 0 if data.has_latents_in_memory else worker_count(data.options)


def _leave_interrupts(worker: int) -> None:
    """Ctrl+C is the main process's: it ends its workers, and one message is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
