"""Empty modules and the tensors that fill them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from library.core.tensor_file import save_tensors
from library.models.filling import Component, Source, empty, plan, same_names
from library.models.weights import Weights

CPU = torch.device("cpu")


def component(**more) -> Component:
    return Component("layer", "net.", lambda _: empty(lambda: nn.Conv2d(3, 2, 1)), same_names, **more)


def test_a_kernel_written_as_a_matrix_fills_its_convolution(tmp_path: Path):
    matrix = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "a.safetensors", {"net.weight": matrix, "net.bias": torch.ones(2)})
    weights = Weights([tmp_path / "a.safetensors"])
    layer = plan(component(), weights.under("net.")).fill(weights, torch.float32, CPU)
    assert torch.equal(layer.get_parameter("weight"), matrix[:, :, None, None])
    assert not layer.training and not layer.get_parameter("weight").requires_grad


def test_a_variant_is_taken_where_the_file_has_its_key(tmp_path: Path):
    tensors = {"net.weight": torch.zeros(2, 3, 1, 1), "net.offset": torch.ones(2)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    weights = Weights([tmp_path / "a.safetensors"])
    described = component(variants=(("bias", Source("offset")),))
    assert torch.equal(plan(described, weights.under("net.")).fill(weights, torch.float32, CPU).get_parameter("bias"), torch.ones(2))


def test_missing_extra_and_misshapen_tensors_are_said_at_once():
    with pytest.raises(ValueError) as error:
        plan(component(), {"weight": (2, 4, 1, 1), "new": (1,)})
    assert str(error.value).splitlines() == [
        "layer: 1 missing tensors: net.bias",
        "layer: 1 extra tensors: net.new",
        "layer: 1 misshapen tensors: net.weight [2, 4, 1, 1] for [2, 3, 1, 1]",
    ]


def test_an_empty_module_has_real_buffers():
    module = empty(lambda: nn.BatchNorm1d(3))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any(buffer.is_meta for buffer in module.buffers())
