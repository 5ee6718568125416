"""The instruments of a run: what they show and when, and that they leave the run alone."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_family import SmallFamily
from toy_step import toy_batch

from library.core.tensor_file import load_tensors
from library.training.adapters import NetworkOptions, build_trained_network
from library.training.length import Length
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.step import BatchLoss
from library.training.tracking.instruments import Instruments
from library.training.tracking.options import LogOptions

STEPS = 25


@pytest.fixture
def instruments(sdxl: SmallFamily, images, tmp_path):
    def make(*extra: str) -> Instruments:
        AcceleratorState._reset_state(reset_partial_state=True)
        options = sdxl.options(images, tmp_path, *extra, module="networks.lora")
        models = sdxl.arch.load(options[sdxl.arch.ModelOptions], device=torch.device("cpu"), dtype=torch.float32)
        trained = build_trained_network(models, options[NetworkOptions], options[OptimizerOptions], text_is_cached=False)
        length = Length(steps_per_epoch=10, steps=STEPS)
        return Instruments.of(options[LogOptions], Accelerator(cpu=True), sdxl.arch, trained, length)

    return make


def loss(*pairs: tuple[float, float]) -> BatchLoss:
    values, timesteps = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return BatchLoss(of_samples=values, timesteps=timesteps)


def test_what_the_device_holds_is_read_at_first_every_nth_step_and_at_last(instruments) -> None:
    found = instruments()
    read = [step for step in range(1, STEPS + 1) if any(key.startswith("norm/weight") for key in found.figures(step))]
    assert read == [1, 10, 20, 25]


def test_never_means_never_but_speed_is_still_known(instruments) -> None:
    found = instruments("--log_norms_every_n_steps", "0")
    batch = toy_batch([(0, 0), (1, 0)])
    for step in range(1, STEPS + 1):
        next(found.timed([batch]))
        found.see_loss(loss((1.0, 5.0), (1.0, 5.0)), batch)
        found.see_gradients(step, 1.0, 1.0)
        figures = found.figures(step)
        assert all(key.startswith("speed/") for key in figures)
        assert figures["speed/images_seen"] == 2 * step and figures["speed/images_per_second"] > 0


def test_losses_of_the_steps_since_the_last_reading_are_in_the_bands(instruments) -> None:
    found, batch = instruments(), toy_batch([(0, 0), (1, 0)])
    found.figures(1)
    for pairs in (((1.0, 10.0), (3.0, 20.0)), ((5.0, 900.0), (8.0, 200.0))):
        found.see_loss(loss(*pairs), batch)
    figures = found.figures(10)
    assert {key: value for key, value in figures.items() if "band" in key} == {"loss/band/0-250": 4.0, "loss/band/750-1000": 5.0}


def test_samples_of_weight_zero_are_not_in_the_bands(instruments) -> None:
    found, batch = instruments(), toy_batch([(0, 0), (1, 0)])
    batch.loss_weights = torch.tensor([1.0, 0.0])
    found.see_loss(loss((1.0, 10.0), (0.0, 10.0)), batch)
    assert found.figures(1)["loss/band/0-250"] == 1.0


def test_bands_are_those_of_all_ranks(instruments) -> None:
    class TwoRanks:
        """The other rank has seen one sample of loss 5 in the first band."""

        num_processes, device = 2, torch.device("cpu")

        def reduce(self, sums: torch.Tensor, way: str) -> torch.Tensor:
            assert way == "sum"
            return sums + torch.tensor([[5.0, 0, 0, 0], [1.0, 0, 0, 0]])

    found = instruments()
    found.accelerator = TwoRanks()
    found.see_loss(loss((1.0, 10.0)), toy_batch([(0, 0)]))
    assert found.figures(1)["loss/band/0-250"] == 3.0


def test_gradients_are_measured_where_that_is_due_and_once(instruments) -> None:
    found = instruments()
    for parameter in found.kinds.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen = {}
    for step in (1, 2, 10):
        if step < 10:
            found.see_gradients(step, None, 0.0)
        seen[step] = {key for key in found.figures(step) if key.startswith("norm/gradient")}
    assert seen[1] and not seen[2] and not seen[10]


def test_a_saved_state_goes_on_with_the_same_figures(instruments) -> None:
    every = "--log_norms_every_n_steps", "5"  # two readings an epoch
    first, second, batch = instruments(*every), instruments(*every), toy_batch([(0, 0), (1, 0)])
    first.see_loss(loss((1.0, 10.0), (3.0, 600.0)), batch)
    first.figures(1)
    first.see_loss(loss((2.0, 10.0), (3.0, 10.0)), batch)
    first.figures(2)
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.see_loss(loss((2.0, 10.0), (7.0, 800.0)), batch)
    figures = [
        {key: value for key, value in one.figures(10).items() if "band" in key or key == "speed/images_seen"} for one in (first, second)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 4


def test_measuring_often_or_never_trains_the_same_bytes(family: SmallFamily, images, tmp_path) -> None:
    arguments = ["--max_train_epochs", "1", "--cache_latents"]
    often = family.run(images, tmp_path / "often", *arguments, "--log_norms_every_n_steps", "1")
    never = family.run(images, tmp_path / "never", *arguments, "--log_norms_every_n_steps", "0")
    first, second = load_tensors(often.file), load_tensors(never.file)
    assert often.losses == never.losses and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
