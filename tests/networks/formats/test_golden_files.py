"""Files written by LyCORIS, PEFT and sd-scripts, read through the reader, mean the delta that those libraries apply."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import relative_error
from one_layer import read_one
from torch import nn

from library.core.tensor_file import load_tensors

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
LAYERS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
IGNORED_SCALE = "lycoris/lokr_linear_48x64_f8_full_rs.safetensors"
ABSENT = "peft/lokr_conv1d_f2_full.safetensors"  # what PEFT means there is no LoKr; test_reader.py shows that it is refused


def entries() -> list[dict[str, Any]]:
    index = GOLDEN / "index.json"
    return json.loads(index.read_text())["files"] if index.is_file() else []


def layer_of(entry: dict[str, Any]) -> nn.Module:
    layer = entry["layer"]
    if layer["kind"] == "linear":
        return nn.Linear(layer["in"], layer["out"])
    return LAYERS[layer["kind"]](
        layer["in"], layer["out"], tuple(layer["kernel"]), stride=layer.get("stride", 1), padding=layer.get("padding", 0)
    )


@pytest.fixture(params=entries() or [None], ids=lambda entry: entry["file"] if entry else "absent")
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param is None:
        pytest.skip("needs ../shared/golden")
    return request.param


def test_a_golden_file_means_the_recorded_delta(entry: dict[str, Any]):
    tensors = load_tensors(GOLDEN / entry["file"])
    layer = layer_of(entry)
    if "base.weight" in tensors:
        layer.weight.data.copy_(tensors["base.weight"])
    stored = {key.removeprefix("adapter."): value for key, value in tensors.items() if key.startswith("adapter.")}
    adapter = read_one(layer, stored, entry.get("adapter_config")).eval()
    if entry["file"] == IGNORED_SCALE:  # LyCORIS trains with sqrt(dim), and its files do not say so
        assert relative_error(adapter.delta_weight() * entry["scale"], tensors["expected.delta"]) < 1e-5
        return
    assert relative_error(adapter.delta_weight(), tensors["expected.delta"]) < 1e-5
    if "input.x" in tensors:
        x = tensors["input.x"]
        assert relative_error(adapter(x), adapter.shape.apply(x, tensors["expected.delta"])) < 1e-5
        assert relative_error(adapter(x), tensors["expected.y_delta"]) < 5e-5  # recorded as a difference of two float32 outputs


def test_all_of_them_are_there():
    found = entries() or pytest.skip("needs ../shared/golden")
    names = {entry["file"] for entry in found}
    assert len(names) == 75 and IGNORED_SCALE in names and ABSENT not in names
