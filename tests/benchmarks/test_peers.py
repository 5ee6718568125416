"""Every way to adapt a layer computes the same: outputs, input gradients and factor gradients, from the same values."""

import pytest
import torch
from torch import nn

from benchmarks.contest import Ground, contestant_on, factor_values, frozen_contestant, interleaved
from benchmarks.numerics import errors, exact_delta, seen_shares, without_base
from benchmarks.peers import OURS, PACKAGES, SD_SCRIPTS, WAYS, Setting, available_ways, bare_adapter, take_over, trained, twin
from benchmarks.shapes import PRECISIONS, Shape

SHAPES = {"linear": Shape(out=64, inner=48, tokens=10), "convolution": Shape(out=64, inner=48, side=5)}
SETTINGS = [
    Setting(algorithm="lora", rank=4),
    Setting(algorithm="loha", rank=4),
    Setting(algorithm="lokr", rank=2, factor=4),
    Setting(algorithm="lokr", rank=4, factor=4, is_full=True),
    Setting(algorithm="lokr", rank=16, factor=4),  # by its rank stored whole
]


@pytest.mark.parametrize("way", [OURS, SD_SCRIPTS, *(pytest.param(way, marks=pytest.mark.slow) for way in PACKAGES)])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting.title} {setting.rank}")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_computes_the_formula(way: str, setting: Setting, shape: Shape) -> None:
    if way not in available_ways():
        pytest.skip("its package is not installed")
    ground = without_base(Ground.of(shape, PRECISIONS["float32"]))
    values = factor_values(ground.layer, setting, ground.precision)
    contestant = contestant_on(ground.layer, setting, way, WAYS[way], values)
    _, output = ground.trace(contestant)
    found = errors(ground, contestant, output, exact_delta(ground, setting, values))
    assert max(found.values()) < 1e-5


def test_a_twin_shares_weights_and_nothing_else() -> None:
    layer = nn.Linear(4, 4)
    copy = twin(layer)
    copy.forward = lambda x: x
    assert copy.get_parameter("weight") is layer.weight
    assert "forward" not in vars(layer)


def test_values_of_other_parameters_are_refused() -> None:
    layer = nn.Linear(8, 8)
    loha = bare_adapter(layer, Setting(algorithm="loha", rank=2))
    with pytest.raises(ValueError, match="trains lora_down"):
        take_over(bare_adapter(layer, Setting(algorithm="lora", rank=2)), trained(loha))


def test_values_are_taken_over_with_their_dtype_and_not_shared() -> None:
    ground, setting = Ground.of(SHAPES["linear"], PRECISIONS["autocast"]), SETTINGS[1]
    values = factor_values(ground.layer, setting, ground.precision)
    first, second = (contestant_on(ground.layer, setting, way, WAYS[way], values) for way in (OURS, SD_SCRIPTS))
    assert {parameter.dtype for parameter in first.parameters} == {torch.float32}
    first.parameters[0].data.zero_()
    assert all(bool(parameter.any()) for parameter in second.parameters)


def test_two_roundings_lose_a_small_delta_and_one_does_not() -> None:
    shape = Shape(out=64, inner=64, tokens=2048)
    ways = {name: WAYS[name] for name in (OURS, SD_SCRIPTS)}
    shares = seen_shares(shape, PRECISIONS["autocast"], Setting(algorithm="lora", rank=4), ways)
    assert shares[OURS]["seen 0.0001"] == pytest.approx(1, abs=0.1)
    assert shares[SD_SCRIPTS]["seen 0.0001"] < 0.3


def test_turns_are_shared_and_every_order_is_drawn_anew() -> None:
    calls: list[int] = []
    times = interleaved([lambda number=number: calls.append(number) for number in range(5)], "cpu", seconds=0)
    assert [len(spent) for spent in times] == [3] * 5
    assert sorted(calls[:5]) == sorted(calls[5:10]) == list(range(5))
    assert calls[:5] != calls[5:10]


def test_the_frozen_layer_takes_part_without_parameters() -> None:
    ground = Ground.of(SHAPES["linear"], PRECISIONS["float32"])
    frozen = frozen_contestant(ground.layer)
    ground.trace(frozen)
    assert frozen.parameters == []
    assert ground.x.grad is not None
