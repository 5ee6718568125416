"""How exact the ways are: their delta alone against float64, and how much of a small delta is left once the base output is added."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.contest import Contestant, Ground, contestant_on, factor_values
from benchmarks.peers import Setting, Way, bare_adapter, take_over, trained, twin
from benchmarks.shapes import Precision, Shape
from networks.base import Adapter

RATIOS = (1e-4, 1e-3)  # |dW| / |W| at which a delta may be lost


def exact_delta(ground: Ground, setting: Setting, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output of the delta and all gradients by `delta_weight()` in float64: `output`, `input`, and the factors by name."""
    adapter = _exact_adapter(ground, setting, values)
    x, factors = ground.x.detach().double().requires_grad_(), trained(adapter)
    output = adapter.shape.apply(x, adapter.delta_weight())
    gradients = torch.autograd.grad(output, [x, *factors.values()], ground.gradient.double())
    return {"output": output.detach(), **dict(zip(["input", *factors], gradients, strict=True))}


def without_base(ground: Ground) -> Ground:
    """The same input on a layer whose weight and bias are zero: what comes out is the delta alone."""
    layer = twin(ground.layer)
    for parameter in layer.parameters():
        parameter.data = torch.zeros_like(parameter)
    return replace(ground, layer=layer)


def errors(ground: Ground, contestant: Contestant, output: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of the output, of the input gradient, and the worst of a factor's gradient, as a step has left them.

    The ground must be `without_base`.
    """
    assert contestant.adapter is not None
    factors = trained(contestant.adapter)
    return {
        "output error": relative_error(output, exact["output"]),
        "input gradient error": relative_error(_gradient(ground.x), exact["input"]),
        "factor gradient error": max(relative_error(_gradient(factor), exact[name]) for name, factor in factors.items()),
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    return float((value.detach().double().reshape(expected.shape) - expected).norm() / expected.norm())


def seen_shares(
    shape: Shape, precision: Precision, setting: Setting, ways: dict[str, Way], device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """For each way and ratio |dW| / |W| the projection of the delta that the output shows on the true one: 1 where none is lost.

    What the output shows is half the difference of the outputs with dW and with -dW: rounding that hits both alike drops out.
    """
    ground = Ground.of(shape, precision, device)
    values = factor_values(ground.layer, setting, precision)
    exact = exact_delta(ground, setting, values)["output"]
    delta_norm = float(_exact_adapter(ground, setting, values).delta_weight().detach().norm())
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for ratio in RATIOS:
        scaled = replace(ground, layer=twin(ground.layer))
        weight = ground.layer.get_parameter("weight")
        scaled.layer.get_parameter("weight").data = weight * (delta_norm / ratio / float(weight.double().norm()))
        for name, way in ways.items():
            shown = _shown(scaled, setting, name, way, values)
            found[name][f"seen {ratio:g}"] = float((shown * exact).sum() / (exact * exact).sum())
    return found


def _shown(ground: Ground, setting: Setting, name: str, way: Way, values: dict[str, Tensor]) -> Tensor:
    first = next(iter(values))
    signs: Sequence[dict[str, Tensor]] = (values, values | {first: -values[first]})
    plus, minus = (ground.forward(contestant_on(ground.layer, setting, name, way, given).layer).detach().double() for given in signs)
    return (plus - minus) / 2


def _exact_adapter(ground: Ground, setting: Setting, values: dict[str, Tensor]) -> Adapter:
    adapter = bare_adapter(ground.layer, setting)
    take_over(adapter, {name: value.double() for name, value in values.items()})
    return adapter


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
