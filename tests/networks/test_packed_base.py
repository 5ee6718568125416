"""Every algorithm on every way to store the base: the output of the weight that is stored, and the delta in full."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import KINDS, filled, relative_error
from torch import Tensor, nn

from library.core.fp8 import store_as_fp8
from library.core.quantised import FormName, pack_layers
from networks.base import Adapter
from networks.layers import dense_weight
from networks.members import algorithms

STORAGES = ("fp8", "fp8_scaled", "int8", "nf4")
WAYS = {"plain": {}, "dora": {"dora_wd": True}, "dora-in": {"dora_wd": True, "wd_on_output": False}}
CASES = [(storage, kind, way) for storage in STORAGES for kind in ("linear", "conv1x1", "conv3x3") for way in WAYS]


def stored(layer: nn.Module, storage: str) -> nn.Module:
    """The layer, or the one in its place, whose weight is stored like this."""
    model = nn.Sequential(layer).requires_grad_(False)
    count = store_as_fp8(model) if storage == "fp8" else pack_layers(model, cast(FormName, storage), smallest=0)
    assert count == 1
    return model[0]


def attached(algorithm: type[Adapter], layer: nn.Module, arguments: dict[str, Any]) -> Adapter:
    """A trained adapter on a layer: the same for the same algorithm and shape."""
    torch.manual_seed(3)
    adapter = filled(algorithm.fresh("layer", layer, 2, 1.0, algorithm.Arguments(**arguments)), 0.1)
    adapter.attach()
    return adapter


def output_and_gradients(layer: nn.Module, x: Tensor, adapter: Adapter) -> list[Tensor]:
    """Under autocast to bf16, as plain fp8 weights need it."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    return [y, *torch.autograd.grad(y.float().square().mean(), [x, *adapter.parameters()])]


@pytest.mark.parametrize(("storage", "kind", "way"), CASES)
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_an_adapter_trains_as_on_the_dense_weight(algorithm: type[Adapter], storage: str, kind: str, way: str) -> None:
    torch.manual_seed(0)
    layer, x = stored(KINDS[kind].make(), storage), torch.randn(KINDS[kind].input_shape)
    dense = KINDS[kind].make().requires_grad_(False)
    dense.load_state_dict({"weight": dense_weight(layer).float(), "bias": layer.bias})
    found = output_and_gradients(layer, x, attached(algorithm, layer, WAYS[way]))
    expected = output_and_gradients(dense, x, attached(algorithm, dense, WAYS[way]))
    assert all(relative_error(one, other) < 0.02 for one, other in zip(found, expected, strict=True))
    assert all(one.abs().max() > 0 for one in found)


@pytest.mark.parametrize("storage", ["fp8_scaled", "int8", "nf4"])
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_no_storage_rounds_the_delta(algorithm: type[Adapter], storage: str) -> None:
    torch.manual_seed(0)
    layer, x = stored(nn.Linear(64, 48), storage), torch.randn(5, 64)
    adapter = attached(algorithm, layer, {})
    with torch.no_grad():
        base, delta = F.linear(x, dense_weight(layer), cast(Any, layer).bias), x @ adapter.delta_weight().T
        adapter.multiplier = 1e-3 * float(base.norm() / delta.norm())  # far below a step of 8 or 4 bits
        assert relative_error(layer(x) - base, adapter.multiplier * delta) < 1e-3  # float32's rounding of the whole output


@pytest.mark.parametrize("storage", ["fp8_scaled", "int8", "nf4"])
@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.title)
def test_a_merge_into_packed_weights_is_refused(algorithm: type[Adapter], storage: str) -> None:
    adapter = attached(algorithm, stored(nn.Linear(64, 64), storage), {})
    with pytest.raises(ValueError, match="layer: its layer holds a packed .quantised. weight; adapters can be attached to it, not merged"):
        adapter.merge()


@pytest.mark.parametrize("storage", ["fp8_scaled", "int8", "nf4"])
def test_dora_starts_from_the_norms_of_the_weight_that_is_stored(storage: str) -> None:
    layer = stored(nn.Linear(64, 48), storage)
    [lora] = [algorithm for algorithm in algorithms() if algorithm.title == "LoRA"]
    adapter = lora.fresh("layer", layer, 2, 1.0, lora.Arguments(dora_wd=True))
    assert adapter.dora_scale is not None
    torch.testing.assert_close(adapter.dora_scale.detach().flatten(), dense_weight(layer).norm(dim=1))
