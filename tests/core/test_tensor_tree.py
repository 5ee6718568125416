"""Trees of values and tensors come back from JSON and safetensors with the very same bits."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.core.tensor_tree import packed, read_tensors, unpacked, write_tensors

KEYS = st.text(max_size=4) | st.integers() | st.booleans()
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int64, torch.bool)


def through_a_file(tree: Any, folder: Path) -> Any:
    text, tensors = packed(tree, "tree")
    if tensors:
        write_tensors(folder / "tree.safetensors", tensors)
    return unpacked(json.loads(json.dumps(text)), read_tensors(folder / "tree.safetensors") if tensors else {})


@given(TREES)
def test_plain_trees_come_back_as_they_were(tree: Any) -> None:
    text, tensors = packed(tree, "tree")
    found = unpacked(json.loads(json.dumps(text)), tensors)
    assert found == tree and repr(found) == repr(tree)  # repr tells 1 from True and 0.0 from -0.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 5e-324, -0.0, 0.1 + 0.2])
def test_every_float_keeps_its_bits(value: float, tmp_path: Path) -> None:
    found = through_a_file({"x": value}, tmp_path)["x"]
    assert found.hex() == value.hex()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_keep_dtype_shape_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {0: torch.randint(0, 2, (3, 5)).to(dtype), 1: torch.ones((), dtype=dtype), 2: torch.empty(0, 4, dtype=dtype)}
    found = through_a_file(tensors, tmp_path)
    for key, tensor in tensors.items():
        assert found[key].dtype == dtype and found[key].shape == tensor.shape and torch.equal(found[key], tensor)


def test_a_dense_tensor_keeps_its_strides(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = through_a_file([tensor], tmp_path)[0]
    assert found.stride() == tensor.stride() and torch.equal(found, tensor)


def test_one_tensor_in_two_places_is_kept_once_and_shared_again(tmp_path: Path) -> None:
    tensor = torch.randn(4)
    _, tensors = packed({"a": tensor, "b": tensor}, "tree")
    found = through_a_file({"a": tensor, "b": tensor}, tmp_path)
    assert len(tensors) == 1 and found["a"] is found["b"]


def test_counters_and_dtypes_come_back_as_such(tmp_path: Path) -> None:
    found = through_a_file({"milestones": Counter({3: 1, 5: 2}), "dtype": torch.float8_e4m3fn}, tmp_path)
    assert type(found["milestones"]) is Counter and found == {"milestones": Counter({3: 1, 5: 2}), "dtype": torch.float8_e4m3fn}


@pytest.mark.parametrize("value", [print, {1, 2}, object(), torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex64)])
def test_what_needs_a_pickle_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(ValueError, match=r"tree\.state\.0\.x: a "):
        packed({"state": {0: {"x": value}}}, "tree")


@pytest.mark.parametrize("json_text", [{"tensor": "absent"}, {"dtype": "load"}, {"call": "print"}])
def test_json_that_is_no_tree_is_refused(json_text: Any) -> None:
    with pytest.raises(ValueError, match="nothing that a state can hold"):
        unpacked(json_text, {})
