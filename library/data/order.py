"""The order of an epoch: which images stand in which batch, as a pure function of seed and epoch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from library.core.keyed_random import keyed_random
from library.data.entries import ImageEntry
from library.data.options import Size


@dataclass(frozen=True)
class Sample:
    """One use of one image in an epoch: its index, and which of its repeats this is. Draws are keyed by both."""

    image: int
    repeat: int


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one batch, all of one dataset and one bucket."""

    dataset: int
    bucket: Size
    samples: tuple[Sample, ...]


def batch_count(images: Sequence[ImageEntry], batch_sizes: Sequence[int]) -> int:
    """How many batches an epoch has: ceil(uses / batch size), summed over the buckets of every dataset."""
    uses: Counter[tuple[int, Size]] = Counter()
    for image in images:
        uses[image.dataset, image.placement.bucket] += image.repeats
    return sum(-(-count // batch_sizes[dataset]) for (dataset, _), count in uses.items())


def epoch_order(images: Sequence[ImageEntry], batch_sizes: Sequence[int], *, seed: int, epoch: int) -> list[BatchPlan]:
    """The batches of one epoch: every image `repeats` times, the uses of each bucket shuffled, then the batches of all datasets."""
    buckets: dict[tuple[int, Size], list[Sample]] = {}
    for index, image in enumerate(images):
        uses = buckets.setdefault((image.dataset, image.placement.bucket), [])
        uses += [Sample(index, repeat) for repeat in range(image.repeats)]
    plans = []
    for (dataset, bucket), samples in sorted(buckets.items()):
        keyed_random(seed, "bucket", epoch, dataset, *bucket).shuffle(samples)
        size = batch_sizes[dataset]
        plans += [BatchPlan(dataset, bucket, tuple(samples[start : start + size])) for start in range(0, len(samples), size)]
    keyed_random(seed, "order", epoch).shuffle(plans)
    return plans
