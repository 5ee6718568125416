"""The average of the weights: what it is, and that showing it changes nothing."""

import pytest
import torch
from torch import nn

from library.training.optimizing.average import AverageOptions, WeightAverage, average_shown, averaged_file


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,), ())]


def stepped(weights: list[nn.Parameter], average: WeightAverage, steps: int, seed: int = 2) -> list[list[torch.Tensor]]:
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype))
        average.update()
        seen.append([weight.detach().clone() for weight in weights])
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_it_is_the_recurrence_with_its_warm_up_in_float32(decay: float, dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    expected = [weight.detach().double() for weight in weights]
    average = WeightAverage(weights, decay)
    for number, seen in enumerate(stepped(weights, average, 20), 1):
        own = min(decay, (1 + number) / (10 + number))
        expected = [own * kept + (1 - own) * weight.double() for kept, weight in zip(expected, seen, strict=True)]
    for found, wanted in zip(average.state_dict()["average"], expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_shown_within_and_the_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    average = WeightAverage(weights, 0.9)
    stepped(weights, average, 3)
    own = [weight.detach().clone() for weight in weights]
    with average.shown():
        for weight, kept in zip(weights, average.state_dict()["average"], strict=True):
            assert torch.equal(weight, kept.to(dtype)) and weight.requires_grad
        assert not torch.equal(weights[0], own[0])
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights, own, strict=True))


def test_the_weights_come_back_after_an_error() -> None:
    weights = parameters()
    average = WeightAverage(weights, 0.9)
    stepped(weights, average, 2)
    own = weights[0].detach().clone()
    with pytest.raises(RuntimeError), average.shown():
        raise RuntimeError
    assert torch.equal(weights[0], own)


def test_showing_changes_nothing_of_what_follows() -> None:
    plain, shown = parameters(), parameters()
    first, second = WeightAverage(plain, 0.9), WeightAverage(shown, 0.9)
    stepped(plain, first, 2)
    stepped(shown, second, 2)
    with second.shown():
        pass
    stepped(plain, first, 2, seed=3)
    stepped(shown, second, 2, seed=3)
    assert all(map(torch.equal, first.state_dict()["average"], second.state_dict()["average"]))


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    weights, others = parameters(), parameters()
    average, resumed = WeightAverage(weights, 0.99), WeightAverage(others, 0.99)
    stepped(weights, average, 4)
    state = {"updates": average.updates, "average": [tensor.clone() for tensor in average.state_dict()["average"]]}
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    resumed.load_state_dict(state)
    stepped(weights, average, 3, seed=5)
    stepped(others, resumed, 3, seed=5)
    assert resumed.updates == average.updates
    assert all(map(torch.equal, resumed.state_dict()["average"], average.state_dict()["average"]))


def test_a_state_of_other_parameters_is_refused() -> None:
    average = WeightAverage(parameters(), 0.9)
    with pytest.raises(ValueError, match="2 tensors of other shapes than the 3"):
        average.load_state_dict({"updates": 1, "average": [torch.zeros(2), torch.zeros(3)]})


def test_there_is_none_unless_it_is_asked_for() -> None:
    weights = parameters()
    assert WeightAverage.of(AverageOptions(), weights) is None
    with average_shown(None):
        assert torch.equal(weights[0], parameters()[0])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0])
def test_decays_that_average_nothing_are_refused(decay: float) -> None:
    assert "must lie between 0 and 1" in next(iter(AverageOptions(ema_decay=decay).check()))


def test_optimizers_that_average_themselves_are_refused() -> None:
    free = pytest.importorskip("schedulefree").AdamWScheduleFree
    assert "averages the weights itself" in next(AverageOptions(ema_decay=0.9).misfits(free))
    assert not list(AverageOptions(ema_decay=0.9).misfits(torch.optim.AdamW)) and not list(AverageOptions().misfits(free))


def test_bounded_norms_are_said() -> None:
    assert "may be above it" in next(AverageOptions(ema_decay=0.9).remarks(1.0))
    assert not list(AverageOptions(ema_decay=0.9).remarks(None)) and not list(AverageOptions().remarks(1.0))


def test_its_file_stands_beside_the_other(tmp_path) -> None:
    assert averaged_file(tmp_path / "net-step00000100.safetensors") == tmp_path / "net-step00000100_ema.safetensors"
