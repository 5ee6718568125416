"""Every way to a delta against float64, over random shapes: values, gradients, and both half precisions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import filled, relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.base import Adapter
from networks.extras import Dropouts
from networks.kernels import materialised, products
from networks.kernels.choice import Choice
from networks.kernels.cost import FUSED, MATERIALISE
from networks.loha import LoHa
from networks.lokr import LoKr
from networks.lora import LoRA

STRUCTURES: dict[str, tuple[type[Adapter], dict[str, Any]]] = {
    "LoRA": (LoRA, {}),
    "LoHa": (LoHa, {}),
    "LoKr ranked": (LoKr, {"factor": 2}),
    "LoKr whole": (LoKr, {"factor": 2, "full_matrix": True}),
    "LoKr both": (LoKr, {"decompose_both": True, "unbalanced_factorization": True}),
    "LoRA core": (LoRA, {"use_tucker": True}),
    "LoHa core": (LoHa, {"use_tucker": True}),
    "LoKr core": (LoKr, {"use_tucker": True, "factor": 2}),
}
sizes = st.sampled_from((4, 6, 12, 16))


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer with any of its settings, and the shape of an input for it."""
    inner, out, has_bias = draw(sizes), draw(sizes), draw(st.booleans())
    dimensions = draw(st.integers(0, 3))
    if dimensions == 0:
        return nn.Linear(inner, out, has_bias), (*draw(st.lists(st.integers(1, 4), max_size=3)), inner)
    groups = draw(st.sampled_from((1, 1, 2)))
    settings = {name: draw(st.integers(low, 2)) for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))}
    mode = draw(st.sampled_from(("zeros", "circular")))
    if draw(st.booleans()):
        settings |= {"padding": "same", "stride": 1}
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layer = kind(inner, out, draw(st.integers(1, 3)), bias=has_bias, groups=groups, padding_mode=mode, **settings)
    return layer, (draw(st.integers(1, 2)), inner, *(draw(st.integers(5, 6)) for _ in range(dimensions)))


def adapted(structure: str, layer: nn.Module, rank: int, path: str) -> Adapter:
    algorithm, arguments = STRUCTURES[structure]
    adapter = filled(algorithm.fresh("x", layer.requires_grad_(False), rank, rank / 2, algorithm.Arguments(**arguments)))
    adapter.choice = Choice(path)  # pyright: ignore[reportArgumentType]
    adapter.multiplier = 0.7
    adapter.attach()
    return adapter


def gradients_of(output: Tensor, x: Tensor, adapter: Adapter) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((output.double() * weights).sum(), [x, *adapter.parameters()]))


def exact_output(layer: Any, adapter: Adapter, x: Tensor) -> Tensor:
    weight = layer.weight.double() + adapter.multiplier * adapter.double().delta_weight()
    return adapter.shape.apply(x, weight, None if layer.bias is None else layer.bias.double())


def compared(layer: Any, structure: str, rank: int, path: str, dtype: torch.dtype, x: Tensor) -> list[float]:
    """Relative errors of the output and of all gradients, in `dtype`, against autograd through the formula in float64."""
    adapter = adapted(structure, layer.to(dtype), rank, path)
    if dtype == torch.float64:
        adapter.double()
    own = x.to(dtype).requires_grad_()
    output = layer(own)
    found = [output, *gradients_of(output, own, adapter)]
    adapter.detach()
    wide = own.detach().double().requires_grad_()
    exact = exact_output(layer, adapter, wide)
    return [relative_error(a, b) for a, b in zip(found, [exact, *gradients_of(exact, wide, adapter)], strict=True)]


@pytest.mark.parametrize("path", ["auto", "factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
@settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(layer=layers(), rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_layer_through_any_way_is_the_formula(
    structure: str, path: str, layer: tuple[nn.Module, tuple[int, ...]], rank: int, seed: int
):
    module, shape = layer
    torch.manual_seed(seed)
    assert max(compared(module, structure, rank, path, torch.float64, torch.randn(shape))) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_precision_is_that_of_the_dtype(
    structure: str, kind: str, path: str, is_emulated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_is_emulated", lambda dtype: is_emulated)
    torch.manual_seed(0)
    layer = nn.Linear(32, 48) if kind == "linear" else nn.Conv2d(32, 48, 3, padding=1)
    x = torch.randn(4, 40, 32) if kind == "linear" else torch.randn(2, 32, 6, 6)
    errors = compared(layer, structure, 4, path, dtype, x)
    output, gradients = (4e-3, 2e-2) if dtype.itemsize == 2 else (1e-6, 2e-5)
    assert errors[0] < output and max(errors[1:]) < gradients


@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_ways_of_gpu_kernels_are_the_formula_too(structure: str, path: str, monkeypatch: pytest.MonkeyPatch):
    plain = Choice.way
    monkeypatch.setattr(Choice, "way", lambda *arguments: plain(*arguments) + FUSED)
    torch.manual_seed(0)
    assert max(compared(nn.Linear(12, 16), structure, 3, path, torch.float32, torch.randn(2, 5, 12))) < 2e-5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_strides_of_inputs_and_gradients_are_taken(structure: str):
    torch.manual_seed(0)
    layer = nn.Linear(12, 16)
    adapter = adapted(structure, layer, 3, "auto")
    x = torch.randn(12, 5, 4).transpose(0, 2).requires_grad_()
    layer(x).sum().backward()  # a gradient that is one number, seen as many
    found = x.grad
    adapter.detach()
    weight = layer.weight + 0.7 * adapter.delta_weight()
    torch.testing.assert_close(found, weight.sum(0).expand(x.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_delta_alone_is_within_half_a_percent(
    structure: str, path: str, is_emulated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_is_emulated", lambda dtype: is_emulated)
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96), torch.randn(64, 64).to(dtype)
    adapter = adapted(structure, layer, 4, path)
    with torch.autocast("cpu", dtype):
        delta = adapter(x)
    assert delta.dtype == dtype
    assert relative_error(delta, x.double() @ adapter.delta_weight().double().T) < 5e-3


@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_have_gradients(structure: str, kind: str, path: str):
    torch.manual_seed(0)
    layer: Any = (nn.Linear(4, 6) if kind == "linear" else nn.Conv1d(4, 6, 2)).double()
    adapter = adapted(structure, layer, 2, path).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64) if kind == "linear" else torch.randn(2, 4, 3, dtype=torch.float64)
    names = [name for name, _ in adapter.named_parameters()]

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,))

    inputs = [x.requires_grad_(), *(parameter.detach().requires_grad_() for parameter in adapter.parameters())]
    assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_have_gradients_where_more_than_the_input_is_kept(structure: str, kind: str, path: str):
    torch.manual_seed(0)
    layer: Any = (nn.Linear(64, 6) if kind == "linear" else nn.Conv1d(64, 6, 2)).double()
    adapter = adapted(structure, layer, 2, path).double()
    x = torch.randn((3, 64) if kind == "linear" else (2, 64, 3), dtype=torch.float64, requires_grad=True)

    def second(output: Tensor) -> list[Tensor]:
        inputs = [x, *adapter.parameters()]
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in first]).sum(), inputs))

    found = second(layer(x))
    exact = second(exact_output(layer, adapter, x))
    assert max(relative_error(a, b) for a, b in zip(found, exact, strict=True)) < 1e-10


@pytest.mark.parametrize("dropped", [0.0, 0.1])
@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_tokens_are_taken_too(structure: str, kind: str, path: str, dropped: float):
    layer: Any = nn.Linear(64, 48) if kind == "linear" else nn.Conv2d(64, 48, 3)
    adapter = adapted(structure, layer, 2, path)
    adapter.dropouts = Dropouts(rank=dropped)
    x = torch.randn((2, 0, 64) if kind == "linear" else (0, 64, 5, 5), requires_grad=True)
    output = layer(x)
    assert output.shape == ((2, 0, 48) if kind == "linear" else (0, 48, 3, 3))
    assert not any(gradient.any() for gradient in gradients_of(output, x, adapter))


@pytest.mark.parametrize("path", ["factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_factors_in_float8_are_widened_before_they_are_multiplied(structure: str, kind: str, path: str):
    torch.manual_seed(0)
    layer: Any = nn.Linear(64, 48) if kind == "linear" else nn.Conv2d(64, 48, 3)
    adapter = adapted(structure, layer, 2, path).to(torch.float8_e4m3fn)
    x = torch.randn((3, 64) if kind == "linear" else (2, 64, 5, 5))
    with torch.no_grad():
        assert relative_error(adapter.delta(x), adapter.shape.apply(x, adapter.delta_weight())) < 1e-5


@pytest.mark.parametrize("path", ["auto", "factored", "materialise"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_nothing_larger_than_the_input_is_kept(structure: str, kind: str, path: str):
    layer: Any = nn.Linear(64, 64) if kind == "linear" else nn.Conv2d(64, 64, 3, padding=1)
    adapter = adapted(structure, layer, 8, path)
    x = (torch.randn(256, 64) if kind == "linear" else torch.randn(2, 64, 32, 32)).requires_grad_()
    known = {parameter.data_ptr() for parameter in (*adapter.parameters(), *layer.parameters())} | {x.data_ptr()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    limit = 0.1 if structure not in ("LoRA core", "LoKr core") else 0.4  # between their steps: a few times r channels
    assert sum(size for place, size in kept.items() if place not in known) <= limit * x.numel() * 4


@pytest.mark.parametrize("formula", ["LoRA", "LoHa", "LoKr whole"])
def test_blocks_of_rows_make_no_difference(formula: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 24), torch.randn(5, 12)
    whole = compared(layer, formula, 3, MATERIALISE, torch.float64, x)
    monkeypatch.setitem(materialised.BLOCK, "cpu", 30)
    assert max(compared(layer, formula, 3, MATERIALISE, torch.float64, x) + whole) < 1e-10


def test_a_base_that_is_trained_gets_its_gradient():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    adapter = filled(LoRA.fresh("x", layer, 2, 1.0, LoRA.Arguments()))
    adapter.attach()
    layer(x).sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, x.sum(0).expand(4, 6))


def test_without_gradients_the_output_is_the_same():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    for structure in STRUCTURES:
        adapter = adapted(structure, layer, 2, "auto")
        with torch.no_grad():
            alone = layer(x)
        assert torch.equal(alone, layer(x)) and not alone.requires_grad
        assert not torch.equal(alone, F.linear(x, layer.weight, layer.bias))
        adapter.detach()


@pytest.mark.parametrize(("tokens", "copies"), [(512, 0), (4, 2)])
def test_factors_are_cast_once_where_their_copies_are_small_beside_the_input(tokens: int, copies: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_is_emulated", lambda dtype: False)
    layer = nn.Linear(32, 32).requires_grad_(False).to(torch.bfloat16)
    adapter = adapted("LoRA", layer, 2, "auto")
    x = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    casts = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
    assert casts == copies + 2  # of the gradients, back to the factors' dtype
    adapter.detach()
