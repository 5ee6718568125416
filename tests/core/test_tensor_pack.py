"""A packed file is what safetensors would write, and knows its own hashes."""

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from library.core.tensor_file import is_finite, load_tensors, read_header
from library.core.tensor_pack import ORDER, Packed, pack

METADATA = {"ss_a": 'quote " and tab \t and \u00e9'}  # one entry: safetensors writes several in any order


def every_kind() -> dict[str, Tensor]:
    """Tensors of every dtype and several shapes, in an order that is not the file's."""
    torch.manual_seed(1)
    shapes = {"z": (3, 5), "a": (), "m": (0, 4), "k": (2, 3, 1, 2)}
    return {f"{kind}.{dtype}": torch.randint(0, 2, shape).to(dtype) for dtype in reversed(ORDER) for kind, shape in shapes.items()}


def packed(tensors: dict[str, Tensor]) -> Packed:
    return pack(tensors, lambda _, tensor: tensor.dtype)


def test_the_bytes_are_those_of_safetensors(tmp_path: Path):
    tensors = every_kind()
    packed(tensors).write(tmp_path / "ours.safetensors", METADATA)
    assert (tmp_path / "ours.safetensors").read_bytes() == safetensors.torch.save(tensors, METADATA)


def test_tensors_come_back_in_the_dtypes_asked_for(tmp_path: Path):
    tensors = {"b.weight": torch.randn(4, 6).T, "b.alpha": torch.tensor(3.0)}
    pack(tensors, lambda key, _: torch.float32 if key.endswith("alpha") else torch.bfloat16).write(tmp_path / "a.safetensors")
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(loaded["b.weight"], tensors["b.weight"].bfloat16()) and torch.equal(loaded["b.alpha"], tensors["b.alpha"])
    assert read_header(tmp_path / "a.safetensors").metadata == {}


def test_a_part_is_that_of_the_whole_file():
    own = packed(every_kind())
    content = own.header(METADATA) + own.body.numpy().tobytes()
    edge = len(own.header(METADATA))
    for start, stop in [(0, 10), (edge - 7, edge + 9), (edge + 3, edge + 50), (0, 2 * len(content)), (len(content), len(content) + 9)]:
        assert own.part(METADATA, start, stop) == content[start:stop]


def test_the_hash_of_the_body_leaves_the_header_out():
    own = packed(every_kind())
    assert own.body_sha256() == hashlib.sha256(own.body.numpy().tobytes()).hexdigest()


def test_a_dtype_that_files_do_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"tensor 'a' is of torch.complex64"):
        packed({"a": torch.zeros(1, dtype=torch.complex64)})


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "folder").touch()
    with pytest.raises(ValueError, match="a.safetensors: could not be written"):
        packed({"a": torch.zeros(1)}).write(tmp_path / "folder" / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_infinities_and_nan_are_not_finite(dtype: torch.dtype):
    assert is_finite(torch.zeros(3, 3).to(dtype)) and is_finite(torch.zeros(0).to(dtype))
    for value in ("inf", "-inf", "nan"):
        values = torch.zeros(3, 33)
        values[2, 17] = float(value)
        assert not is_finite(values.to(dtype))


def test_whole_numbers_are_finite():
    assert is_finite(torch.arange(3))
