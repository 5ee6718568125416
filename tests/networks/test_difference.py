"""Differences stored whole act on any layer that is linear in its weight and bias."""

import pytest
import torch
from torch import Tensor, nn

from networks.difference import Difference
from networks.members import algorithms


class OwnRMSNorm(nn.Module):
    """A norm as transformers writes them: no subclass of PyTorch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (2, 3, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 5)),
    "conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 5)),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "rms norm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "own rms norm": (lambda: OwnRMSNorm(4), (2, 3, 4)),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, shape = request.param
    layer = make().requires_grad_(False)
    names = ("diff", "diff_b") if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) else ("w_norm", "b_norm")
    values = (layer.weight, getattr(layer, "bias", None))
    tensors = {name: torch.randn(value.shape) for name, value in zip(names, values, strict=True) if value is not None}
    return layer, torch.randn(shape), tensors


def changed(layer: nn.Module, x: Tensor, tensors: dict[str, Tensor], multiplier: float) -> Tensor:
    """The layer's output with the differences added to its parameters."""
    values = {"weight": layer.weight + multiplier * next(iter(tensors.values()))}
    if len(tensors) > 1:
        values["bias"] = layer.bias + multiplier * list(tensors.values())[1]
    return torch.func.functional_call(layer, values, x)


def test_attached_and_merged_are_the_layer_with_other_parameters(case: tuple[nn.Module, Tensor, dict[str, Tensor]]):
    layer, x, tensors = case
    base, expected = layer(x), changed(layer, x, tensors, 0.5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    adapter = Difference.from_tensors("a", layer, tensors).eval()
    adapter.multiplier = 0.5
    adapter.attach()
    torch.testing.assert_close(layer(x), expected)
    adapter.detach()
    assert torch.equal(layer(x), base)
    adapter.merge()
    torch.testing.assert_close(layer(x), expected)
    adapter.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_two_on_a_layer_add_up(case: tuple[nn.Module, Tensor, dict[str, Tensor]]):
    layer, x, tensors = case
    expected = changed(layer, x, tensors, 2)
    for name in ("a", "b"):
        Difference.from_tensors(name, layer, tensors).attach()
    torch.testing.assert_close(layer(x), expected)


def test_its_state_is_what_the_file_had(case: tuple[nn.Module, Tensor, dict[str, Tensor]]):
    layer, _, tensors = case
    adapter = Difference.from_tensors("a", layer, tensors)
    for found in (adapter.state_dict(), adapter.file_tensors()):
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], value) for key, value in tensors.items())


def test_a_bias_alone_changes_no_weight():
    layer = nn.Linear(4, 6)
    adapter = Difference.from_tensors("a", layer, {"diff_b": torch.ones(6)})
    assert torch.equal(adapter.delta_weight(), torch.zeros(6, 4)) and torch.equal(adapter(torch.randn(2, 4)), torch.ones(2, 6))


@pytest.mark.parametrize(
    ("layer", "tensors", "words"),
    [
        (nn.Linear(4, 6, bias=False), {"diff_b": torch.ones(6)}, "a.diff_b: changes a bias, and its layer has none"),
        (nn.Linear(4, 6), {"diff": torch.ones(4, 6)}, r"a.diff has the shape \[4, 6\]; \[6, 4\] was expected"),
        (nn.Linear(4, 6), {"diff": torch.ones(6, 4), "w_norm": torch.ones(6)}, "one difference of a weight or a bias was expected"),
        (nn.Embedding(4, 6), {"diff": torch.ones(4, 6)}, "a Embedding has no adapter"),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Module, tensors: dict[str, Tensor], words: str):
    with pytest.raises(ValueError, match=words):
        Difference.from_tensors("a", layer, tensors)


def test_it_is_no_algorithm_to_train():
    assert Difference not in algorithms()
    with pytest.raises(ValueError, match="a difference is not trained"):
        Difference.fresh("a", nn.Linear(2, 2), 1, 1, None)


def test_shrinking_scales_weight_and_bias_alike():
    adapter = Difference.from_tensors("a", nn.Linear(4, 6), {"diff": torch.ones(6, 4), "diff_b": torch.ones(6)})
    adapter.shrink(0.5)
    assert {parameter.max().item() for parameter in adapter.parameters()} == {0.5}
