"""Atomic writes and checked headers."""

import json
import struct
from pathlib import Path

import pytest
import torch

from library.core.atomic import staged, writable_folder, write_text
from library.core.tensor_file import load_tensors, read_header, save_tensors


def raw_file(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_a_failed_write_leaves_the_earlier_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "first")
    with pytest.raises(RuntimeError), staged(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tensor_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "net.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_while_saving_leaves_the_earlier_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.core.atomic.os.fsync", full)
    with pytest.raises(ValueError, match=r"net.safetensors: could not be written \(No space left on device\)"):
        save_tensors(path, {"a": torch.zeros(2)})
    monkeypatch.undo()
    assert torch.equal(load_tensors(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    tensors = {"a": torch.randn(3, 2).to(torch.bfloat16), "b": torch.arange(4).reshape(2, 2).T}
    save_tensors(path, tensors, {"key": "value"})
    header = read_header(path)
    assert header.metadata == {"key": "value"} and header.tensors["a"].shape == (3, 2) and header.tensors["a"].dtype == "BF16"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_tensors(path).items())


def test_writable_folder_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output_dir .*file: cannot write there"):
        writable_folder(tmp_path / "file", "--output_dir")


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(("header", "body", "message"), [
    ({"a": entry()}, b"1234", "truncated"),
    ({"a": entry()}, b"123456789", "longer than its header says"),
    ({"a": entry(shape=[3])}, b"12345678", "cannot fill 8 bytes"),
    ({"a": entry(shape=[-2])}, b"12345678", "impossible shape"),
    ({"a": entry(dtype="F99")}, b"12345678", "unknown dtype F99"),
    ({"a": entry(data_offsets=[8, 16])}, b"1" * 16, "does not start where"),
    ({"a": {"dtype": "F32"}}, b"", "broken safetensors header"),
    ({"__metadata__": {"a": 1}}, b"", "metadata must be a table of strings"),
    (b'{"a": 1, "a": 2}', b"", "occurs twice"),
    (b"[1]", b"", "not a JSON object"),
    (b"{{", b"", "broken safetensors header"),
])  # fmt: skip
def test_a_lying_header_is_refused_by_file_and_name(tmp_path: Path, header: object, body: bytes, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, body)
    with pytest.raises(ValueError, match=f"bad.safetensors: .*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "not a safetensors"), (b"PK\x03\x04abcdefgh", "pickle"), (b"\xff" * 20, "not a safetensors")]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"other.bin: .*{message}"):
        read_header(path)


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        read_header(tmp_path / "none.safetensors")
    save_tensors(tmp_path / "net.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="no tensor named b"):
        load_tensors(tmp_path / "net.safetensors", ["b"])
