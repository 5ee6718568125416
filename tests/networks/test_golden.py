"""Files written by LyCORIS and sd-scripts mean the delta that those libraries apply."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import relative_error
from torch import nn

from library.core.tensor_file import load_tensors
from networks.formats.reader import algorithm_of

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def entries() -> list[dict[str, Any]]:
    if not (GOLDEN / "index.json").is_file():
        return []
    index = json.loads((GOLDEN / "index.json").read_text())
    wrong = index["known_deviations"]
    return [entry for entry in index["files"] if not entry["file"].startswith("peft") and entry["file"] not in wrong]


def layer_of(entry: dict[str, Any]) -> nn.Module:
    layer = entry["layer"]
    if layer["kind"] == "linear":
        return nn.Linear(layer["in"], layer["out"])
    make = CONVOLUTIONS[layer["kind"]]
    return make(layer["in"], layer["out"], tuple(layer["kernel"]), stride=layer.get("stride", 1), padding=layer.get("padding", 0))


@pytest.fixture(params=entries() or [None], ids=lambda entry: entry["file"] if entry else "absent")
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param is None:
        pytest.skip("needs ../shared/golden")
    return request.param


def test_a_golden_file_means_the_recorded_delta(entry: dict[str, Any]):
    tensors = load_tensors(GOLDEN / entry["file"])
    prefix = "adapter.lora_unet_m."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    layer = layer_of(entry)
    if "base.weight" in tensors:
        layer.weight = nn.Parameter(tensors["base.weight"], requires_grad=False)
    adapter = algorithm_of("lora_unet_m", own).from_tensors("lora_unet_m", layer, own).eval()
    if "expected.merged" in tensors:
        assert relative_error(tensors["base.weight"] + adapter.delta_weight(), tensors["expected.merged"]) < 1e-5
    assert relative_error(adapter.delta_weight(), tensors["expected.delta"]) < 1e-5
    if "input.x" in tensors:
        x = tensors["input.x"]
        assert relative_error(adapter(x), adapter.shape.apply(x, tensors["expected.delta"])) < 1e-5
        assert relative_error(adapter(x), tensors["expected.y_delta"]) < 5e-5  # recorded as a difference of two float32 outputs
    saved = adapter.state_dict()
    assert all(torch.equal(saved[key], value.reshape(saved[key].shape)) for key, value in own.items())
