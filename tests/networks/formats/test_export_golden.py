"""Files written by LyCORIS, PEFT and sd-scripts, exported to every tool and read again, still mean the recorded change."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import relative_error
from export_cases import PART, Model, OneLayer
from other_readers import comfyui
from torch import nn

from library.core.tensor_file import load_tensors
from networks.export import WRITERS, Wishes, export
from networks.files import AdapterFile
from networks.formats.export.check import as_file
from networks.formats.peft_config import PeftConfig
from networks.formats.reader import read_members
from networks.network import Network

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
LAYERS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def entries() -> list[dict[str, Any]]:
    index = json.loads((GOLDEN / "index.json").read_text()) if (GOLDEN / "index.json").is_file() else {"files": [], "known_deviations": {}}
    return [entry for entry in index["files"] if entry["file"] not in index["known_deviations"]]


def model_of(layer: dict[str, Any]) -> Model:
    if layer["kind"] == "linear":
        return Model(nn.Linear(layer["in"], layer["out"]))
    kernel, slides = tuple(layer["kernel"]), {"stride": layer.get("stride", 1), "padding": layer.get("padding", 0)}
    return Model(LAYERS[layer["kind"]](layer["in"], layer["out"], kernel, **slides))


@pytest.fixture(params=entries() or [None], ids=lambda entry: entry["file"] if entry else "absent")
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param is None:
        pytest.skip("needs ../shared/golden")
    return request.param


@pytest.mark.parametrize("target", WRITERS)
def test_a_golden_file_goes_to_every_tool_and_back(entry: dict[str, Any], target: str):
    tensors = load_tensors(GOLDEN / entry["file"])
    model = model_of(entry["layer"])
    weight = model.m.get_parameter("weight")
    if "base.weight" in tensors:
        weight.data.copy_(tensors["base.weight"])
    stored = {key.removeprefix("adapter."): value for key, value in tensors.items() if key.startswith("adapter.")}
    config = {"": PeftConfig.of(entry["adapter_config"], "config")} if "adapter_config" in entry else {}
    parts = [(PART, model)]
    network = Network(read_members(AdapterFile(tensors=stored, config=config), OneLayer(), parts), OneLayer(), parts)
    try:
        exported = export(network, target)
    except ValueError:
        exported = export(network, target, wishes=Wishes(as_lora=True)) if weight.dim() in (2, 4) or target != "kohya" else None
    if exported is None:  # sd-scripts adapts no Conv1d and Conv3d
        return
    if exported.entries[0].magnitudes_moved:
        own = {key.removeprefix("lora_unet_m."): tensor for key, tensor in exported.tensors.items()}
        assert relative_error(comfyui(tensors["base.weight"], own) - tensors["base.weight"], tensors["expected.delta"]) < 2e-5
        return
    (member,) = read_members(as_file(exported.files), OneLayer(), parts)
    assert relative_error(member.adapter.delta_weight(), tensors["expected.delta"]) < 1e-5
