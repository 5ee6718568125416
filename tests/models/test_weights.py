"""The tensors of several files as one table."""

import re
from pathlib import Path

import pytest
import torch

from library.core.tensor_file import save_tensors
from library.models.weights import Weights, leave_out


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    save_tensors(paths[0], {"net.a": torch.zeros(2), "net.step": torch.zeros((), dtype=torch.int64)})
    save_tensors(paths[1], {"net.b": torch.ones(3), "ema.b": torch.ones(3), "vae.scale_weight": torch.ones(1)})
    return paths


def test_shards_are_one_table_read_in_the_order_asked_for(shards: list[Path]):
    weights = Weights(shards)
    assert weights.under("net.") == {"a": (2,), "step": (), "b": (3,)}
    assert [tensor.numel() for tensor in weights.read(["net.b", "net.a"])] == [3, 2]


def test_integers_and_scales_are_refused_where_they_are_asked_for(shards: list[Path]):
    weights = Weights(shards)
    weights.check_plain("ema.")
    with pytest.raises(ValueError, match=r"0\.safetensors: holds quantised or integer weights, .*: net\.step"):
        weights.check_plain("net.")
    with pytest.raises(ValueError, match=r"1\.safetensors: holds scaled weights; .*: vae\.scale_weight"):
        weights.check_plain("vae.")


def test_what_is_left_out_is_said_once_unless_it_carries_nothing(shards: list[Path], caplog: pytest.LogCaptureFixture):
    constants = re.compile(r".*\.step")
    tables = [Weights(shards, leave_out(constants, ("ema.",))).shapes for _ in range(2)]
    assert [list(table) for table in tables] == [["net.a", "net.b", "vae.scale_weight"]] * 2
    assert [record.getMessage() for record in caplog.records] == ["the tensors under 'ema.' of the checkpoint are ignored"]


def test_what_is_left_out_is_not_said_where_nobody_loads(shards: list[Path], caplog: pytest.LogCaptureFixture):
    assert "ema.b" not in Weights(shards, leave_out(re.compile("x"), ("ema.",), says=False)).shapes
    assert not caplog.records
