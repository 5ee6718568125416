"""What a run is said to cost is what it costs, on runs whose cost is known."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Trace, repeats_for, seconds_of, traced

ROWS, SIDE = 3, 8
BYTES = ROWS * SIDE * 4  # of an input and of an output


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, SIDE, requires_grad=True), torch.randn(SIDE, SIDE)


def trace_of_sine() -> Trace:
    x, weight = given()
    return traced(lambda: F.linear(x, weight).sin(), torch.ones(ROWS, SIDE), owned=[weight])


def test_kernels_are_what_computes_and_no_views() -> None:
    assert trace_of_sine().kernels == 5  # product, sine; cosine, its multiplication, product


def test_parameters_are_not_counted_as_kept() -> None:
    x, weight = given()
    assert traced(lambda: F.linear(x, weight), torch.ones(ROWS, SIDE), owned=[weight]).kept_bytes == 0
    assert traced(lambda: F.linear(x, weight), torch.ones(ROWS, SIDE)).kept_bytes == SIDE * SIDE * 4


def test_what_is_kept_twice_counts_once() -> None:
    x, _ = given()
    assert traced(lambda: (x * 2).sin() + (x * 2).cos(), torch.ones(ROWS, SIDE)).kept_bytes == 2 * BYTES
    doubled = x * 2
    assert traced(lambda: doubled.sin() + doubled.cos(), torch.ones(ROWS, SIDE)).kept_bytes == BYTES


def test_the_peak_is_of_tensors_alive_together() -> None:
    x, _ = given()

    def forward() -> Tensor:
        total = x.detach() + 1
        for _ in range(5):
            total = total + 1  # the one before is dropped: never more than two at once
        return (total * x).sum()

    peak = traced(forward).peak_bytes
    assert 2 * BYTES <= peak <= 3 * BYTES + 16


def test_a_convolutions_gradients_are_a_kernel_each() -> None:
    kernels = []
    for is_trained in (True, False):
        layer, x = nn.Conv2d(2, 2, 3).requires_grad_(is_trained), torch.randn(1, 2, 6, 6, requires_grad=True)
        kernels.append(traced(lambda layer=layer, x=x: layer(x), torch.ones(1, 2, 4, 4)).kernels)
    assert kernels == [4, 2]  # forward, and gradients of input, weight and bias or of the input alone


def test_exchanges_with_the_host_are_counted() -> None:
    x, _ = given()
    assert traced(lambda: (x * float(x.detach().sum())).sum()).host_exchanges == 1
    assert traced(lambda: (x * torch.tensor(2.0)).sum()).host_exchanges == 1
    assert traced(lambda: (x * 2.0).sum()).host_exchanges == 0


def test_time_is_of_one_run_whatever_the_repeats() -> None:
    calls = []
    seconds_of(lambda: calls.append(1), repeats=4)
    assert len(calls) == 4
    assert repeats_for(lambda: None) > 100
