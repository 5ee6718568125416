"""Streamed files hold what safetensors reads, bit for bit; a failure leaves no part."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.core.tensor_file import read_header, save_tensors
from library.core.tensor_stream import CODES, Entry, TensorReader, aligned, write_stream

SHAPES = {"matrix": (3, 5), "number": (), "empty": (0, 4), "one": (1,), "kernel": (2, 3, 1, 2)}


def every_kind() -> dict[str, Tensor]:
    """Random bits, so nan too, in every dtype and shape."""
    torch.manual_seed(1)
    tensors = {}
    for dtype, code in CODES.items():
        for kind, shape in SHAPES.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            high = 2 if dtype == torch.bool else 256
            tensors[f"{code} {kind}"] = torch.randint(0, high, (size,), dtype=torch.uint8).view(dtype).reshape(shape)
    return tensors


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return aligned(Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def equal_bits(a: Tensor, b: Tensor) -> bool:
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw[0], raw[1])


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, body_hash: str | None = None):
    entries = entries_of(tensors)
    return write_stream(path, entries, (tensors[entry.name] for entry in entries), metadata, body_hash=body_hash)


def test_safetensors_reads_what_was_written_bit_for_bit(tmp_path: Path):
    tensors = every_kind()
    written = write(tmp_path / "a.safetensors", tensors, {"title": "T\u00f6y", "x": '"'})
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        assert file.metadata() == {"title": "T\u00f6y", "x": '"'}
    again = load_file(tmp_path / "a.safetensors")
    assert set(again) == set(tensors)
    assert all(equal_bits(again[name], tensor) for name, tensor in tensors.items())
    content = (tmp_path / "a.safetensors").read_bytes()
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_reader_gives_what_safetensors_wrote(tmp_path: Path):
    tensors = every_kind()
    save_tensors(tmp_path / "a.safetensors", tensors)
    with TensorReader(tmp_path / "a.safetensors") as reader:
        assert all(equal_bits(reader.read(name), tensor) for name, tensor in tensors.items())
        starts = [info.start for info in reader.tensors.values()]
    assert starts == sorted(starts) and len(starts) == len(tensors)


def test_every_tensor_is_aligned_and_the_order_is_else_kept(tmp_path: Path):
    write(tmp_path / "a.safetensors", every_kind())
    header = read_header(tmp_path / "a.safetensors")
    assert all(info.start % max(1, info.size // max(1, torch.Size(info.shape).numel())) == 0 for info in header.tensors.values())
    assert [e.name for e in aligned([Entry("b", torch.float16, ()), Entry("c", torch.float32, ()), Entry("a", torch.float16, ())])] == [
        "c",
        "b",
        "a",
    ]


def test_the_hash_of_the_body_stands_in_the_metadata(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    written = write(path, {"w": torch.randn(3, 3)}, {"modelspec.hash_sha256": "0xold", "title": "t"}, body_hash="modelspec.hash_sha256")
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert read_header(path).metadata == {"modelspec.hash_sha256": f"0x{hashlib.sha256(body).hexdigest()}", "title": "t"}
    assert written.sha256 == hashlib.sha256(content).hexdigest()


def test_a_failure_leaves_the_earlier_file_and_no_part(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.ones(2)})

    def broken():
        yield torch.zeros(2)
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_stream(path, [Entry("w", torch.float32, (2,)), Entry("x", torch.float32, (2,))], broken())
    assert torch.equal(load_file(path)["w"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(3)], r"tensor 'w' is torch.float32 \[3\]"),
        ([torch.zeros(2).half()], "is torch.float16"),
        ([], "argument 2 is shorter"),
    ],
)
def test_tensors_that_are_not_what_their_entry_says_are_refused(tmp_path: Path, tensors: list[Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        write_stream(tmp_path / "a.safetensors", [Entry("w", torch.float32, (2,))], tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'w' occurs twice"):
        write_stream(tmp_path / "a.safetensors", [Entry("w", torch.float32, ())] * 2, [torch.zeros(())] * 2)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.core.atomic.os.fsync", full)
    with pytest.raises(ValueError, match=r"a.safetensors: could not be written \(No space left on device\)"):
        write(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_while_it_is_read_is_told(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.ones(100)})
    with TensorReader(path) as reader:
        with path.open("rb+") as file:
            file.truncate(100)
        with pytest.raises(ValueError, match=r"a.safetensors: ended while it was read"):
            reader.read("w")
