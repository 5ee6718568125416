"""The kernels as operators of PyTorch: their schemas, their place in compiled graphs, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreting import interpreted
from torch import Tensor

from networks.kernels.products import as_output
from networks.kernels.triton.hadamard import hadamard_gradients, hadamard_weight
from networks.kernels.triton.linear import extended_linear, extended_linear_input_gradient, extended_linears
from networks.kernels.triton.machine import can_read, is_new_enough
from networks.kernels.triton.mixing import kronecker_mix

pytest.importorskip("triton")


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def arguments(name: str) -> tuple[Any, ...]:
    factors = (10, 4), (4, 12), (10, 4), (4, 12)
    x, base, bias, hidden, up, w1, blocks, out, weight = tensors(
        (6, 12), (10, 12), (10,), (6, 4), (10, 4), (3, 2), (5, 2, 7), (5, 3, 7), (10, 12)
    )
    return {
        "hadamard_weight": (*tensors(*factors), 0.3, base, torch.float16),
        "hadamard_gradients": (base, *tensors(*factors), 0.3),
        "extended_linears": (x, [weight, weight + 1], [bias, bias + 1], [hidden, hidden + 1], [up, up + 1], 0.3),
        "kronecker_mix": (w1, blocks, 0.3),
        "kronecker_mix_": (w1, blocks, out, 0.3),
    }[name]


NAMES = "hadamard_weight", "hadamard_gradients", "extended_linears", "kronecker_mix", "kronecker_mix_"


def check_operator(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.hadron, name).default, arguments(name))


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_their_schema_with_kernels(name: str):
    interpreted(check_operator, name)


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_their_schema_composed(name: str):
    check_operator(name)


def everything(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, x: Tensor) -> Tensor:
    """Every kernel once, as the insides of an autograd function would call them."""
    weight = hadamard_weight(a1, b1, a2, b2, 0.3)
    gradients = hadamard_gradients(weight, a1, b1, a2, b2, 0.3)
    hidden = x @ gradients[1].T
    y = extended_linear(x, weight, None, hidden, gradients[0], 0.5)
    (z,) = extended_linears(y @ weight, [weight], [y[0]], [hidden], [gradients[2]])
    blocks = z.view(z.shape[0], 2, -1)
    return kronecker_mix(a1[:2, :2], blocks, kronecker_mix(a1[:2, :2], blocks, scale=2.0))


class Everything(torch.autograd.Function):
    """The kernels within an autograd function, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        return as_output(everything(*factors, x), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *factors = ctx.saved_tensors
        return grad.sum() * x, *hadamard_gradients(grad.sum() * hadamard_weight(*factors), *factors)


def compiled_against_eager(tokens: tuple[int, ...]) -> tuple[list[float], set[str]]:
    """Differences of outputs and gradients compiled without a graph break, and the operators that its graphs call."""
    torch._dynamo.reset()
    called: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_compiler

    whole = aot_autograd(fw_compiler=make_boxed_compiler(backend))
    compiled = torch.compile(lambda *given: Everything.apply(*given), fullgraph=True, dynamic=True, backend=whole)
    differences = []
    for count in tokens:
        inputs = [0.1 * t for t in tensors((count, 12), (10, 4), (4, 12), (10, 4), (4, 12))]
        leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
        results = []
        for run, own in zip((Everything.apply, compiled), leaves, strict=True):
            y = run(*own)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), own)))
        differences += [float((eager - other).norm() / eager.norm()) for eager, other in zip(*results, strict=True)]
    return differences, {name for name in called if name.startswith("hadron")}


@pytest.mark.slow
def test_kernels_compile_without_a_graph_break():
    differences, called = interpreted(compiled_against_eager, (6, 9, 20))
    assert max(differences) < 1e-5
    assert called >= {"hadron.hadamard_weight.default", "hadron.hadamard_gradients.default", "hadron.extended_linears.default"}
    assert any(name.startswith("hadron.kronecker_mix") for name in called)


@pytest.mark.slow
def test_composed_forms_compile_without_a_graph_break():
    differences, called = compiled_against_eager((6, 9))
    assert max(differences) < 1e-5
    assert not called  # their parts are open to the compiler


def each_by_itself(is_autocast: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        x, (weight, _), (bias, _), (hidden, _), (up, _), scale = arguments("extended_linears")
        weights = hadamard_weight(*arguments("hadamard_weight")[:4])
        gradients = hadamard_gradients(*arguments("hadamard_gradients"))
        y = extended_linear(x, weight, bias, hidden, up, scale)
        grad_x = extended_linear_input_gradient(y, weight, hidden, weight[:4], scale)
        return [weights, *gradients, y, grad_x, kronecker_mix(*arguments("kronecker_mix")[:2])]


@pytest.mark.parametrize("call", [lambda function, *given: function(*given), interpreted], ids=["composed", "kernels"])
def test_autocast_changes_nothing(call: Callable[..., list[Tensor]]):
    for plain, cast in zip(call(each_by_itself, False), call(each_by_itself, True), strict=True):
        assert plain.equal(cast)


def weight_with_a_graph() -> bool:
    try:
        hadamard_weight(*(factor.requires_grad_() for factor in arguments("hadamard_gradients")[1:5]))
    except AssertionError:
        return True
    return False


def test_a_kernel_refuses_to_lose_a_gradient():
    assert interpreted(weight_with_a_graph)


def test_importing_the_functions_imports_no_kernels():
    code = (
        "import sys; from networks.kernels.triton import hadamard, linear, mixing; "
        "print([name for name in sys.modules if name.endswith('_kernels')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_gpu_is_asked_once_and_its_answer_is_a_constant_of_graphs(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (8, 9))
    device = torch.device("cuda", 123)
    assert is_new_enough(device)
    assert is_new_enough(device)
    assert asked == [device]
    compiled = torch.compile(lambda x: x + is_new_enough(device), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1


def test_tensors_apart_or_too_wide_are_not_read():
    assert not can_read(torch.zeros(1), torch.zeros(1, device="meta"))
    assert interpreted(can_read, torch.zeros(1), None)
    assert not interpreted(can_read, torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not interpreted(can_read, torch.zeros(1, dtype=torch.int8))
