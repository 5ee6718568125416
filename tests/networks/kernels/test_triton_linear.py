"""The kernel of a frozen layer with a small product against float64, interpreted on the CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import interpreted
from torch import Tensor

from networks.kernels.triton.linear import (
    composed_extended_linear,
    extended_linear,
    extended_linear_input_gradient,
    extended_linears,
    supports_extended_linear,
    supports_extended_linears,
    tile_for,
)

pytest.importorskip("triton")
ERRORS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 4e-3}  # the interpreter cuts bfloat16 off where GPUs round it
few = settings(max_examples=12, deadline=None, derandomize=True)
sides, ranks, dtypes = st.integers(1, 150), st.integers(4, 64), st.sampled_from(sorted(ERRORS, key=str))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    y = x.double() @ weight.double().T + scale * hidden.double() @ up.double().T
    return y if bias is None else y + bias.double()


def layer(tokens: int, out: int, inner: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (tokens, inner), (out, inner), (out,), (tokens, rank), (out, rank)
    x, weight, bias, hidden, up = (random(*shape, dtype=dtype) for shape in shapes)
    return x, weight, bias, hidden, up


@few
@given(sides, sides, sides, ranks, dtypes, st.booleans())
def test_the_output_is_the_formula(tokens: int, out: int, inner: int, rank: int, dtype: torch.dtype, has_bias: bool):
    x, weight, bias, hidden, up = layer(tokens, out, inner, rank, dtype)
    given = x, weight, bias if has_bias else None, hidden, up, 0.3
    y = interpreted(extended_linear, *given)
    assert y.dtype == dtype
    assert error(y, exact_linear(*given)) < ERRORS[dtype]


@few
@given(sides, sides, sides, ranks, dtypes)
def test_the_input_gradient_is_the_formula(tokens: int, out: int, inner: int, rank: int, dtype: torch.dtype):
    x, weight, _, grad_hidden, _ = layer(tokens, out, inner, rank, dtype)
    grad, down = random(tokens, out, dtype=dtype), random(rank, inner, dtype=dtype)
    grad_x = interpreted(extended_linear_input_gradient, grad, weight, grad_hidden, down, 0.3)
    exact = grad.double() @ weight.double() + 0.3 * grad_hidden.double() @ down.double()
    assert grad_x.shape == x.shape
    assert error(grad_x, exact) < ERRORS[dtype]


def test_base_bias_and_delta_are_rounded_once():
    given = (*layer(70, 90, 80, 8, torch.float16), 0.001)
    y = interpreted(extended_linear, *given)
    once = exact_linear(*given).half()
    assert (y == once).float().mean() > 0.995  # the rest are ties within float32's own error
    twice = (exact_linear(*given[:3], 0 * given[3], given[4], 0).half() + (0.001 * given[3].double() @ given[4].double().T).half()).half()
    assert (twice == once).float().mean() < 0.9


def test_leading_dimensions_are_kept():
    x, hidden = random(2, 3, 5, 20), random(2, 3, 5, 4)
    given = x, random(30, 20), None, hidden, random(30, 4), 1.0
    y = interpreted(extended_linear, *given)
    assert y.shape == (2, 3, 5, 30)
    assert error(y, exact_linear(*given)) < ERRORS[torch.float32]


def test_a_small_product_in_float32_joins_one_in_half_precision():
    x, weight, bias, hidden, up = layer(40, 30, 50, 5, torch.float16)
    given = x, weight, bias, hidden.float(), up.float(), 0.5
    y = interpreted(extended_linear, *given)
    assert y.dtype == torch.float16
    assert error(y, exact_linear(*given)) < ERRORS[torch.float16]


def attention_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """x, and weights, biases, hiddens and ups of three layers; the hidden values are columns of one product."""
    outs, hidden = (100, 130, 20), random(70, 3 * 6, dtype=dtype)
    weights, biases, ups = ([random(out, *rest, dtype=dtype) for out in outs] for rest in ((40,), (), (6,)))
    return random(70, 40, dtype=dtype), weights, biases, list(hidden.split(6, dim=1)), ups


def outputs_of_a_group(dtype: torch.dtype) -> list[Tensor]:
    inputs = attention_inputs(dtype)
    assert supports_extended_linears(*inputs)
    return extended_linears(*inputs, 0.3)


@pytest.mark.parametrize("dtype", ERRORS)
def test_layers_of_one_input_are_each_the_formula(dtype: torch.dtype):
    x, *layers = attention_inputs(dtype)
    outputs = interpreted(outputs_of_a_group, dtype)
    for y, weight, bias, hidden, up in zip(outputs, *layers, strict=True):
        assert error(y, exact_linear(x, weight, bias, hidden, up, 0.3)) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", ERRORS)
def test_the_composed_form_is_the_formula(dtype: torch.dtype):
    given = (*layer(40, 30, 50, 5, dtype), 0.3)
    assert error(composed_extended_linear(*given), exact_linear(*given)) < ERRORS[dtype]


def test_a_kernel_is_offered_where_it_runs():
    x, weight, bias, hidden, up = given = layer(20, 30, 40, 4, torch.float32)
    assert not supports_extended_linear(*given)  # a CPU, not interpreting

    def offered(*given: Any) -> bool:
        return interpreted(supports_extended_linear, *given)

    assert offered(*given)
    assert not offered(x, weight.half(), bias, hidden, up)
    assert not offered(*(tensor.double() for tensor in given))
    inputs = attention_inputs()
    assert interpreted(supports_extended_linears, *inputs)
    assert not interpreted(supports_extended_linears, inputs[0], inputs[1], [None, *inputs[2][1:]], *inputs[3:])


def test_few_tokens_get_flat_tiles():
    assert [tile_for(tokens, 2).rows for tokens in (1, 64, 65, 256, 257, 1 << 20)] == [64, 64, 64, 64, 128, 128]
    assert tile_for(1, 2).columns < tile_for(256, 2).columns
