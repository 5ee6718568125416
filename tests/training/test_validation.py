"""The validation loss: the same pictures, noise and timesteps every time, and nothing of the training touched."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from small_family import SmallFamily
from torch import Tensor
from toy_step import seen_by, toy_batch, toy_context

from library.core.tensor_file import load_tensors
from library.data.batch import Batch
from library.data.dataset import TrainingData
from library.diffusion.ddpm import DDPMProcess
from library.diffusion.flow import FlowProcess
from library.diffusion.process import NoiseProcess
from library.training.step import StepContext, batch_loss, loss_at
from library.training.validation import LEVELS, ValidationOptions, fixed_draws, validate
from networks.extras import Dropouts
from networks.network import Network

IMAGES = range(7)


class Held:
    """Held-out pictures in batches of a size, without files."""

    has_latents_in_memory, seed = True, 1

    def __init__(self, batch_size: int = 2, images: Sequence[int] = IMAGES) -> None:
        uses = [(image, 0) for image in images]
        self.groups = [uses[start : start + batch_size] for start in range(0, len(uses), batch_size)]

    def order(self, epoch: int) -> list:
        return self.groups

    def batches_per_epoch(self, world: int = 1) -> int:
        return -(-len(self.groups) // world)

    def batch(self, epoch: int, position: int) -> Batch:
        batch = toy_batch(self.groups[position % len(self.groups)], epoch=epoch, position=position)
        return batch if position < len(self.groups) else Batch(**{**vars(batch), "loss_weights": torch.zeros(len(batch.images))})


class Rank:
    """One rank of several; it keeps what it would send to the others."""

    is_local_main_process, device = False, torch.device("cpu")

    def __init__(self, index: int = 0, world: int = 1) -> None:
        self.process_index, self.num_processes, self.shares = index, world, torch.zeros(0, 10)

    def gather(self, shares: Tensor) -> Tensor:
        self.shares = shares
        return shares


def measure(context: StepContext, data: Held | None = None, rank: Rank | None = None, most: int | None = None) -> float:
    held, accelerator = cast(TrainingData, data or Held()), cast(Accelerator, rank or Rank())
    return validate(context, held, accelerator, "step", most=most)["loss/validation/step_average"]


def test_it_is_the_same_every_time_whatever_was_drawn_between() -> None:
    context = toy_context()
    first = measure(context)
    batch_loss(context, toy_batch([(1, 0)]))
    torch.manual_seed(99)
    random.seed(99)
    assert measure(context) == first == measure(toy_context(seed=6))


def test_it_follows_the_network() -> None:
    context = toy_context()
    first = measure(context)
    with torch.no_grad():
        next(context.own_model.network.parameters()).mul_(2)
    assert measure(context) != first


def test_random_state_mode_and_gradients_are_left_as_they_were() -> None:
    context = toy_context()
    network = context.own_model.network
    before = torch.get_rng_state(), random.getstate()
    for mode in (True, False):
        network.train(mode)
        measure(context)
        assert network.training is mode
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_dropouts_do_not_act() -> None:
    context, plain = toy_context(), toy_context()
    for adapter in cast(Network, context.own_model.network).adapters:
        adapter.dropouts = Dropouts(neuron=0.9)
    context.own_model.network.train()
    assert measure(context) == measure(plain)
    assert batch_loss(context, toy_batch([(1, 0)])).mean != batch_loss(plain, toy_batch([(1, 0)])).mean


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    assert measure(toy_context(), Held(batch_size)) == pytest.approx(measure(toy_context(), Held(2)), rel=1e-5)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_pictures_without_loss_or_doubling(world: int) -> None:
    ranks = [Rank(index, world) for index in range(world)]
    for rank in ranks[: len(Held().groups)]:
        measure(toy_context(), rank=rank)
    total, count, *_ = torch.cat([rank.shares for rank in ranks]).sum(0).tolist()
    assert count == len(IMAGES)
    assert total / count == pytest.approx(measure(toy_context()), rel=1e-5)


@pytest.mark.parametrize("process", [DDPMProcess, FlowProcess])
def test_the_bands_are_the_losses_at_their_timesteps(process: type[NoiseProcess]) -> None:
    context, batch = toy_context(process()), toy_batch([(image, 0) for image in IMAGES])
    assert batch.latents is not None
    expected: dict[str, list[float]] = {}
    with torch.no_grad():
        for drawn in fixed_draws(context, batch, batch.latents):
            found = loss_at(context, batch, batch.latents, drawn)
            for loss, timestep in zip(found.of_samples.tolist(), found.timesteps.tolist(), strict=True):
                low = min(int(timestep // 250), 3) * 250
                expected.setdefault(f"loss/validation/epoch_band/{low}-{low + 250}", []).append(loss)
    figures = validate(toy_context(process()), cast(TrainingData, Held()), cast(Accelerator, Rank()), "epoch")
    bands = {key: value for key, value in figures.items() if "band" in key}
    assert bands == {key: pytest.approx(sum(losses) / len(losses), rel=1e-5) for key, losses in expected.items()} and len(bands) > 2


def test_max_validation_steps_bounds_the_batches_of_all_ranks_together() -> None:
    assert measure(toy_context(), most=2) == pytest.approx(measure(toy_context(), Held(2, IMAGES[:4])))
    assert measure(toy_context(), most=100) == measure(toy_context())
    ranks = [Rank(index, 2) for index in range(2)]
    for rank in ranks:
        measure(toy_context(), rank=rank, most=2)
    assert [int(rank.shares[0, 1]) for rank in ranks] == [2, 2]


@pytest.mark.parametrize("process", [DDPMProcess, FlowProcess])
def test_each_picture_is_seen_once_in_each_quarter_of_the_timesteps_that_training_draws(process: type[NoiseProcess]) -> None:
    context = toy_context(process())
    latents = torch.zeros(50, 4, 6, 6)
    batch = toy_batch([(image, 0) for image in range(50)])
    drawn = torch.stack([drawn.timesteps for drawn in fixed_draws(context, batch, latents)]).float()
    expected = context.process.timesteps((100_000, 4, 6, 6), torch.Generator().manual_seed(1)).float()
    quarters = expected.quantile(torch.linspace(0, 1, LEVELS + 1))
    places = torch.bucketize(drawn.mean(1), quarters)
    assert drawn.shape == (LEVELS, 50) and bool((drawn.diff(dim=0) >= 0).all())
    assert places.tolist() == [1, 2, 3, 4]
    distance = (torch.searchsorted(expected.sort().values, drawn.flatten().sort().values) / len(expected) - torch.linspace(0, 1, 200)).abs()
    assert distance.max() < 0.05  # as many in every part of the range as training has


def test_levels_have_noise_of_their_own() -> None:
    context = toy_context()
    noises = [drawn.noise for drawn in fixed_draws(context, toy_batch([(0, 0)]), torch.zeros(1, 4, 6, 6))]
    assert len({float(noise.sum()) for noise in noises}) == LEVELS
    assert len(seen_by(context)) == 0


@pytest.mark.parametrize("name", ["validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"])
def test_numbers_below_one_are_refused(name: str) -> None:
    assert list(ValidationOptions(**{name: 0}).check()) == [f"--{name} 0: must be at least 1"]


def test_it_is_due_after_every_epoch_and_after_steps_where_they_are_asked_for() -> None:
    plain, both = ValidationOptions(), ValidationOptions(validate_every_n_steps=3, validate_every_n_epochs=2)
    assert [plain.due_after_step(3), plain.due_after_epoch(1), plain.due_after_epoch(2)] == [False, True, True]
    assert [step for step in range(1, 10) if both.due_after_step(step)] == [3, 6, 9]
    assert [epoch for epoch in range(1, 6) if both.due_after_epoch(epoch)] == [2, 4]


# Whole runs

HOLD = ["--validation_split", "0.4", "--max_train_epochs", "2"]


def test_a_run_measures_what_it_holds_out_and_trackers_get_it(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    family.run(images, tmp_path, *HOLD, "--validate_every_n_steps", "2", "--logging_dir", str(tmp_path / "logs"))
    events = next(path for path in (tmp_path / "logs").rglob("events*") if path.stat().st_size > 0)
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    names = ("step", "epoch")
    counts = {name: len(reader.Scalars(f"loss/validation/{name}_average")) for name in names}
    steps = len(reader.Scalars("loss/current"))
    assert counts == {"step": steps // 2, "epoch": 2}
    assert all(0 < event.value < 10 for name in names for event in reader.Scalars(f"loss/validation/{name}_average"))


@pytest.mark.parametrize("extra", [[], ["--cache_latents"]], ids=["pixels", "cached"])
def test_measuring_changes_nothing_in_the_run(extra: list[str], family: SmallFamily, images: Path, tmp_path: Path) -> None:
    arguments = [*HOLD, *extra, "--network_args", "rank_dropout=0.3"]
    often = family.run(images, tmp_path / "often", *arguments, "--validate_every_n_steps", "1")
    never = family.run(images, tmp_path / "never", *arguments, "--validate_every_n_epochs", "1000")
    assert often.losses == never.losses
    first, second = load_tensors(often.file), load_tensors(never.file)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_cached_latents_and_workers_measure_the_same(
    sdxl: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for extra in ([], ["--cache_latents"], ["--max_data_loader_n_workers", "2"]):
        sdxl.run(images, tmp_path, *HOLD, *extra)
        said.append([float(loss) for loss in re.findall(r"validation: loss (\S+) on 2 pictures", capsys.readouterr().err)])
    assert len(said[0]) == 2 and said[0] == said[2]
    assert said[1] == pytest.approx(said[0], rel=1e-3)


def test_asking_for_validation_without_pictures_is_said(
    sdxl: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdxl.run(images, tmp_path, "--max_train_steps", "1", "--validate_every_n_steps", "5")
    assert "--validate_every_n_steps has no effect: no picture is held out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's launcher is not reliable there")
def test_two_processes_measure_what_one_does(family: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*HOLD, "--learning_rate", "1e-12"]
    family.run(images, tmp_path / "one", *arguments)
    alone = re.findall(r"validation: loss (\S+) on (\d) pictures", capsys.readouterr().err)
    run = [
        f"{family.arch.name}_train_network.py", *family.files, "--dataset_config", str(images / "dataset.toml"), "--network_module",
        "networks.loha", "--network_dim", "2", "--seed", "1", "--output_dir", str(tmp_path / "two"), "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *run, *arguments]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    together = re.findall(r"validation: loss (\S+) on (\d) pictures", done.stderr)
    assert together == alone and len(alone) == 2
