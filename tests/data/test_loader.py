"""What the loader gives: the same batches for any number of workers, after any resume, on any number of ranks."""

import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from dataset_samples import one_subset
from hypothesis import given
from hypothesis import strategies as st

from library.data.batch import Batch
from library.data.config import Dataset
from library.data.dataset import BatchDataset, Latents, TrainingData
from library.data.entries import ImageEntry
from library.data.images.buckets import Placement
from library.data.loader import batch_loader, workers_for
from library.data.options import DataOptions, DatasetOptions, SubsetOptions

BUCKETS = [(64, 64), (32, 96), (96, 32)]
IMAGES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=20)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5))
WORLDS = st.integers(1, 5)


class Numbered:
    """A latent store without files: an image's latents are its index."""

    in_memory = True

    def latents(self, image: int, flipped: bool) -> Latents:
        return Latents(torch.full((1, 1, 1), float(image)))


def described(images: list[tuple[int, int, int]], sizes: tuple[int, int]) -> TrainingData:
    """Data of images from (dataset, bucket number, repeats), and a batch size for each of two datasets."""
    subset = SubsetOptions(image_dir=Path("x"), shuffle_caption=True)
    datasets = [Dataset(options=DatasetOptions(resolution=64, batch_size=size), subsets=(subset,), where={}) for size in sizes]
    entries = [
        ImageEntry(
            folder=Path("x"), name=f"{n}.png", size=(64, 64), placement=Placement(BUCKETS[bucket], BUCKETS[bucket]), repeats=repeats,
            caption=f"a, b, c, d, {n}", dataset=dataset, subset=0, options=subset,
        )
        for n, (dataset, bucket, repeats) in enumerate(images)
    ]  # fmt: skip
    data = TrainingData(datasets, entries, DataOptions(), seed=3)
    data.latents = Numbered()
    return data


def contents(batch: Batch) -> tuple:
    return batch.epoch, batch.position, batch.images, batch.captions, batch.draws, batch.loss_weights.tolist()


@given(IMAGES, SIZES, WORLDS, st.integers(0, 3))
def test_on_any_number_of_ranks_every_image_counts_exactly_repeats_times(images, sizes, world: int, epoch: int) -> None:
    data = described(images, sizes)
    ranks = [BatchDataset(data, epoch, rank=rank, world=world) for rank in range(world)]
    batches = [rank[step] for rank in ranks for step in range(len(rank))]
    uses = [draw for batch in batches for draw, weight in zip(batch.draws, batch.loss_weights.tolist(), strict=True) if weight > 0]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(uses) == len(set(uses))
    assert Counter(image for image, _ in uses) == Counter({n: repeats for n, (_, _, repeats) in enumerate(images)})


@given(IMAGES, SIZES, WORLDS)
def test_ranks_give_between_them_what_one_gives_alone(images, sizes, world: int) -> None:
    data = described(images, sizes)
    alone = [contents(data.batch(1, position)) for position in range(data.batches_per_epoch())]
    ranks = [BatchDataset(data, 1, rank=rank, world=world) for rank in range(world)]
    together = [contents(rank[step]) for step in range(len(ranks[0])) for rank in ranks]
    assert together[: len(alone)] == alone


@given(IMAGES, SIZES, WORLDS, st.data())
def test_a_resumed_run_goes_on_with_the_batches_that_were_left(images, sizes, world: int, drawn) -> None:
    data = described(images, sizes)
    rank = drawn.draw(st.integers(0, world - 1))
    whole = BatchDataset(data, 0, rank=rank, world=world, epochs=3)
    done = drawn.draw(st.integers(0, len(whole)))
    epoch, step = divmod(done, data.batches_per_epoch(world))
    if epoch < 3:
        rest = BatchDataset(data, epoch, start=step * world, rank=rank, world=world, epochs=3 - epoch)
        assert [contents(batch) for batch in rest] == [contents(whole[index]) for index in range(done, len(whole))]


@given(IMAGES, SIZES, SIZES)
def test_what_is_drawn_for_a_use_knows_nothing_of_its_batch(images, sizes, others) -> None:
    def captions(data: TrainingData) -> dict:
        batches = [data.batch(2, position) for position in range(data.batches_per_epoch())]
        return {draw: caption for batch in batches for draw, caption in zip(batch.draws, batch.captions, strict=True)}

    assert captions(described(images, sizes)) == captions(described(images, others))


@pytest.fixture
def pictures(make_folder, build) -> TrainingData:
    sizes = [(64, 64)] * 5 + [(64, 96)] * 3
    bucketed = "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32\nbatch_size = 2"
    drawn = "num_repeats = 2\nflip_aug = true\nrandom_crop = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2"
    return build(one_subset(make_folder(sizes=sizes), bucketed, drawn))


@pytest.mark.parametrize(("workers", "rank", "world", "start"), [(1, 0, 1, 0), (2, 1, 2, 0), (2, 0, 1, 3), (2, 2, 3, 3)])
def test_workers_give_what_the_main_process_gives(pictures: TrainingData, workers: int, rank: int, world: int, start: int) -> None:
    given = {"rank": rank, "world": world, "start": start, "epochs": 2}
    here, there = (list(batch_loader(pictures, 0, workers=number, **given)) for number in (0, workers))
    assert [contents(batch) for batch in here] == [contents(batch) for batch in there]
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(here, there, strict=True))


def test_batches_are_pinned_exactly_where_there_is_a_gpu(pictures: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert batch_loader(pictures, 0).pin_memory is has_gpu


def test_no_worker_is_started_where_no_file_is_read(pictures: TrainingData) -> None:
    assert workers_for(pictures) > 0
    pictures.latents = Numbered()
    assert workers_for(pictures) == 0


def test_the_masks_and_strength_of_a_dataset_reach_its_batches(make_folder, build) -> None:
    strong, weak = make_folder("strong"), make_folder("weak")
    data = build(one_subset(strong, "network_multiplier = -1.5", "alpha_mask = true") + one_subset(weak))
    for batch in batch_loader(data, 0):
        is_strong = "strong" in batch.images[0]
        assert batch.network_multiplier == (-1.5 if is_strong else 1.0)
        assert (batch.mask is not None) == is_strong


def test_interrupting_is_left_to_the_main_process(pictures: TrainingData) -> None:
    loader = batch_loader(pictures, 0)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert loader.worker_init_fn is not None
        loader.worker_init_fn(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_repeating_the_last_batches_of_several_ranks_draws_nothing_new(pictures: TrainingData) -> None:
    last = pictures.batches_per_epoch()
    first, again = pictures.batch(0, 0), pictures.batch(0, last)
    assert again.loss_weights.tolist() == [0.0] * len(again.images)
    assert again.draws == first.draws
