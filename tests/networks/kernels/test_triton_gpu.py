"""The kernels on a GPU against float64: rounding, tensor cores and launches as they are. See the interpreted tests for the edges."""

import pytest
import torch
from torch import Tensor

from networks.kernels.triton.hadamard import hadamard_gradients, hadamard_weight, supports_hadamard_gradients
from networks.kernels.triton.linear import extended_linear, extended_linear_input_gradient, extended_linears, supports_extended_linears
from networks.kernels.triton.mixing import kronecker_mix, supports_kronecker_mix

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ERRORS = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 4e-3}  # float32 factors are TF32 where the result is half precision


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


def factors(rows: int, columns: int, rank: int) -> list[Tensor]:
    return [random(rows, rank), random(rank, columns), random(rows, rank) + 0.1, random(rank, columns) - 0.1]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("rank", [4, 16, 32, 64])
def test_loha(rank: int, dtype: torch.dtype):
    stored, grad = factors(650, 1290, rank), random(650, 1290, dtype=dtype)
    assert supports_hadamard_gradients(grad, *stored)
    leaves = [factor.double().requires_grad_() for factor in stored]
    exact = 0.3 * (leaves[0] @ leaves[1]) * (leaves[2] @ leaves[3])
    assert error(hadamard_weight(*stored, 0.3, dtype=dtype), exact.detach()) < ERRORS[dtype]
    gradients = hadamard_gradients(grad, *stored, 0.3)
    for gradient, truth in zip(gradients, torch.autograd.grad(exact, leaves, grad.double()), strict=True):
        assert error(gradient, truth) < (5e-6 if dtype == torch.float32 else 1e-3)


def test_gradients_are_the_same_bytes_every_time():
    stored, grad = factors(1280, 1280, 16), random(1280, 1280, dtype=torch.bfloat16)
    first = hadamard_gradients(grad, *stored)
    for _ in range(5):
        assert all(again.equal(gradient) for again, gradient in zip(hadamard_gradients(grad, *stored), first, strict=True))


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("tokens", [5, 77, 1000])
def test_layers_of_one_input(tokens: int, dtype: torch.dtype):
    outs, hidden = (640, 650, 130), random(tokens, 48, dtype=dtype)
    weights, biases, ups = ([random(out, *rest, dtype=dtype) for out in outs] for rest in ((1280,), (), (16,)))
    x, hiddens = random(tokens, 1280, dtype=dtype), list(hidden.split(16, dim=1))
    assert supports_extended_linears(x, weights, biases, hiddens, ups)
    outputs = extended_linears(x, weights, biases, hiddens, ups, 0.3)
    for y, weight, bias, small, up in zip(outputs, weights, biases, hiddens, ups, strict=True):
        exact = x.double() @ weight.double().T + bias.double() + 0.3 * small.double() @ up.double().T
        assert error(y, exact) < ERRORS[dtype]
        assert extended_linear(x, weight, bias, small, up, 0.3).equal(y)


@pytest.mark.parametrize("dtype", ERRORS)
def test_the_input_gradient(dtype: torch.dtype):
    grad, weight = random(1000, 640, dtype=dtype), random(640, 1290, dtype=dtype)
    grad_hidden, down = random(1000, 16, dtype=dtype), random(16, 1290, dtype=dtype)
    exact = grad.double() @ weight.double() + 0.3 * grad_hidden.double() @ down.double()
    assert error(extended_linear_input_gradient(grad, weight, grad_hidden, down, 0.3), exact) < ERRORS[dtype]


def test_a_small_delta_is_seen_whole():
    x, weight, hidden, up = (random(*shape, dtype=torch.bfloat16) for shape in ((1024, 1280), (1280, 1280), (1024, 16), (1280, 16)))
    exact = hidden.double() @ up.double().T
    scale = 1e-3 * float((x.double() @ weight.double().T).norm() / exact.norm())
    nothing = x.double() @ weight.double().T
    seen = extended_linear(x, weight, None, hidden, up, scale).double() - nothing
    assert float((seen * exact).sum() / (scale * exact.square().sum())) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("outer", "inner", "width"), [(8, 8, 160), (4, 32, 16), (128, 60, 33)])
def test_lokr(outer: int, inner: int, width: int, dtype: torch.dtype):
    w1, blocks, out = random(outer, inner, dtype=dtype), random(300, inner, width, dtype=dtype), random(300, outer, width, dtype=dtype)
    assert supports_kronecker_mix(w1, blocks, out)
    exact = 0.3 * w1.double() @ blocks.double()
    assert error(kronecker_mix(w1, blocks, scale=0.3), exact) < ERRORS[dtype]
    truth = exact + out.double()
    assert error(kronecker_mix(w1, blocks, out, 0.3), truth) < ERRORS[dtype]


def test_blocks_compile_to_kernels():
    blocks = random(100, 8, 160, dtype=torch.bfloat16)
    compiled = torch.compile(lambda w1, blocks: kronecker_mix(w1, blocks) * 2, fullgraph=True)
    assert error(compiled(random(8, 8), blocks), 2 * random(8, 8).bfloat16().double() @ blocks.double()) < 2 * ERRORS[torch.bfloat16]
