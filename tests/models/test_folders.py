"""Folders of the libraries: a configuration that makes no model is named, whatever its class raises."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from library.models.folders import built


def _linear(config: Mapping[str, Any]) -> nn.Module:
    if config["out"] == 0:
        raise ValueError("has no outputs")
    return nn.Linear(config["in"], config["out"])


@pytest.mark.parametrize("config", [{"in": "a", "out": 2}, {"out": 2}, {"in": -1, "out": 2}])
def test_a_configuration_that_the_class_cannot_take_is_named(tmp_path: Path, config: dict[str, Any]):
    with pytest.raises(ValueError, match=r"cannot be made as .*config\.json says: "):
        built(tmp_path, _linear, config)


def test_what_a_family_says_of_a_configuration_stands_as_it_is(tmp_path: Path):
    with pytest.raises(ValueError, match="^has no outputs$"):
        built(tmp_path, _linear, {"in": 1, "out": 0})
    assert isinstance(built(tmp_path, _linear, {"in": 1, "out": 1}), nn.Linear)
