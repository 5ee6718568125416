"""The order of batches: every image exactly `repeats` times, whatever the ranks, workers and resumes."""

import pickle
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from dataset_samples import one_subset
from hypothesis import given
from hypothesis import strategies as st

from library.data.entries import ImageEntry
from library.data.images.buckets import Placement
from library.data.loader import BatchDataset, batch_loader, worker_count
from library.data.options import DataOptions, SubsetOptions
from library.data.order import batch_count, epoch_order

BUCKETS = [(64, 64), (32, 96), (96, 32)]
IMAGES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=20)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5))


def entries(described: list[tuple[int, int, int]]) -> list[ImageEntry]:
    """Images from (dataset, bucket number, repeats)."""
    options = SubsetOptions(image_dir=Path("x"))
    return [
        ImageEntry(
            folder=Path("x"),
            name=f"{n}.png",
            size=(64, 64),
            placement=Placement(BUCKETS[bucket], BUCKETS[bucket]),
            repeats=repeats,
            caption="",
            dataset=dataset,
            subset=0,
            options=options,
        )
        for n, (dataset, bucket, repeats) in enumerate(described)
    ]


@given(IMAGES, SIZES, st.integers(0, 5))
def test_every_image_stands_exactly_repeats_times_in_an_epoch(described, sizes, epoch):
    images = entries(described)
    plans = epoch_order(images, sizes, seed=1, epoch=epoch)
    uses = Counter(sample for plan in plans for sample in plan.samples)
    assert set(uses.values()) == {1}
    assert Counter(sample.image for sample in uses) == Counter({n: image.repeats for n, image in enumerate(images)})


@given(IMAGES, SIZES)
def test_a_batch_holds_one_bucket_of_one_dataset_and_only_the_last_is_smaller(described, sizes):
    images = entries(described)
    plans = epoch_order(images, sizes, seed=1, epoch=0)
    assert len(plans) == batch_count(images, sizes)
    for plan in plans:
        assert {(images[sample.image].dataset, images[sample.image].placement.bucket) for sample in plan.samples} == {
            (plan.dataset, plan.bucket)
        }
        assert 1 <= len(plan.samples) <= sizes[plan.dataset]
    smaller = Counter((plan.dataset, plan.bucket) for plan in plans if len(plan.samples) < sizes[plan.dataset])
    assert all(count == 1 for count in smaller.values())


def test_epochs_and_seeds_differ_and_repeat_themselves():
    images = entries([(0, n % 3, 2) for n in range(12)])
    orders = {(seed, epoch): epoch_order(images, [2], seed=seed, epoch=epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert all(orders[key] == epoch_order(images, [2], seed=key[0], epoch=key[1]) for key in orders)
    assert len({str(order) for order in orders.values()}) == 4


@pytest.fixture
def data(make_folder, build):
    sizes = [(64, 64)] * 5 + [(64, 96)] * 3 + [(130, 70)] * 2
    bucketed = "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32\nbatch_size = 2"
    augmented = "num_repeats = 3\nflip_aug = true\nrandom_crop = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2"
    return build(one_subset(make_folder(sizes=sizes), bucketed, augmented))


def contents(batch) -> tuple:
    return batch.epoch, batch.position, batch.images, batch.captions, batch.sizes.crop.tolist(), batch.pixels


def assert_same(one, other) -> None:
    assert contents(one)[:-1] == contents(other)[:-1]
    assert torch.equal(one.pixels, other.pixels)


def test_a_batch_depends_on_seed_epoch_and_position_alone(data):
    wanted = [data.batch(1, position) for position in range(data.batches_per_epoch())]
    copy = pickle.loads(pickle.dumps(data))
    random.seed(0)
    torch.manual_seed(0)
    copy.batch(0, 3)
    for position in (5, 0, 3):
        assert_same(copy.batch(1, position), wanted[position])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data, workers):
    for here, there in zip(batch_loader(data, 0), batch_loader(data, 0, workers=workers), strict=True):
        assert_same(here, there)


def test_the_loader_leaves_the_global_random_state_alone(data):
    before = torch.get_rng_state(), random.getstate()
    list(batch_loader(data, 0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_loader_started_in_the_middle_gives_the_rest(data):
    whole = list(batch_loader(data, 2))
    rest = list(batch_loader(data, 2, start=4))
    assert len(rest) == len(whole) - 4
    for here, there in zip(whole[4:], rest, strict=True):
        assert_same(here, there)


def test_one_loader_goes_on_into_the_next_epochs(data):
    places = [(batch.epoch, batch.position) for batch in batch_loader(data, 1, start=2, epochs=2)]
    steps = data.batches_per_epoch()
    assert places == [(1, position) for position in range(2, steps)] + [(2, position) for position in range(steps)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_an_epoch_without_loss_or_doubling(data, world):
    ranks = [BatchDataset(data, 0, rank=rank, world=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [rank[step] for step in range(len(ranks[0])) for rank in ranks]
    uses = Counter(path for batch in batches for path, weight in zip(batch.images, batch.loss_weights.tolist(), strict=True) if weight > 0)
    assert set(uses.values()) == {3}
    assert len(uses) == 10
    alone = [data.batch(0, position) for position in range(data.batches_per_epoch())]
    for here, there in zip(batches, alone, strict=False):
        assert_same(here, there)


def test_choices_for_an_image_do_not_depend_on_the_batch_size(data, make_folder, build, tmp_path):
    text = (tmp_path / "data.toml").read_text()
    other = build(text.replace("batch_size = 2", "batch_size = 5"))

    def views(some) -> dict:
        samples = [sample for plan in some.order(0) for sample in plan.samples]
        return {sample: (view.caption, view.crop) for sample in samples for view in [some.view(0, sample)]}

    assert views(data) == views(other)


def test_the_crop_told_to_the_model_is_the_crop_made(data):
    crops = set()
    for position in range(data.batches_per_epoch()):
        plan, batch = data.order(0)[position], data.batch(0, position)
        for row, sample in enumerate(plan.samples):
            view = data.view(0, sample)
            top, left = batch.sizes.crop[row].tolist()
            assert 0 <= top <= view.image.placement.slack[1]
            assert left == (view.image.placement.slack[0] - view.crop.corner[0] if view.crop.flipped else view.crop.corner[0])
            assert batch.sizes.original[row].tolist() == list(view.image.size[::-1])
            assert batch.sizes.target[row].tolist() == list(batch.pixels.shape[-2:])
            crops.add((top, left))
    assert len(crops) > 5


def test_the_centre_crop_loses_what_sticks_out(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 104)])))
    assert data.batch(0, 0).sizes.crop.tolist() == [[20, 0]]


def test_datasets_keep_their_own_resolution_and_batch_size(make_folder, build):
    first, second = make_folder("a", [(64, 64)] * 4), make_folder("b", [(64, 64)] * 3)
    text = one_subset(first, "batch_size = 4") + one_subset(second, "batch_size = 2").replace("resolution = 64", "resolution = 32")
    data = build(text)
    shapes = Counter(tuple(data.batch(0, position).pixels.shape) for position in range(data.batches_per_epoch()))
    assert shapes == {(4, 3, 64, 64): 1, (2, 3, 32, 32): 1, (1, 3, 32, 32): 1}


def test_no_more_workers_than_processors():
    assert worker_count(DataOptions(max_data_loader_n_workers=0)) == 0
    assert 1 <= worker_count(DataOptions(max_data_loader_n_workers=1000)) < 1000
