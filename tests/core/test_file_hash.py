"""Hashes of files."""

import hashlib
from pathlib import Path

import pytest

from library.core import file_hash
from library.core.file_hash import file_sha256, sampled_file_hash, short_file_hash


def test_the_whole_hash_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_short_hash_sees_64_kib_at_1_mib_only(tmp_path: Path):
    inside = b"x" * 0x10000
    (tmp_path / "a").write_bytes(b"a" * 0x100000 + inside + b"a")
    (tmp_path / "b").write_bytes(b"b" * 0x100000 + inside + b"bb")
    assert short_file_hash(tmp_path / "a") == short_file_hash(tmp_path / "b") == hashlib.sha256(inside).hexdigest()[:8]


def test_the_sampled_hash_of_a_small_file_sees_every_byte(tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(999) + b"x")
    assert sampled_file_hash(tmp_path / "a") != sampled_file_hash(tmp_path / "b")


@pytest.mark.parametrize("place", [0, -1], ids=["first byte", "last byte"])
def test_the_sampled_hash_of_a_large_file_sees_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int):
    monkeypatch.setattr(file_hash, "CHUNK", 16)
    monkeypatch.setattr(file_hash, "SAMPLES", 3)
    content = bytearray(range(100))
    (tmp_path / "a").write_bytes(content)
    content[place] ^= 1
    (tmp_path / "b").write_bytes(content)
    assert sampled_file_hash(tmp_path / "a") != sampled_file_hash(tmp_path / "b")


def test_the_sampled_hash_sees_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_hash, "CHUNK", 16)
    monkeypatch.setattr(file_hash, "SAMPLES", 3)
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "b").write_bytes(bytes(101))
    assert sampled_file_hash(tmp_path / "a") != sampled_file_hash(tmp_path / "b")


def test_names_do_not_count(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    assert sampled_file_hash(tmp_path / "a") == sampled_file_hash(tmp_path / "b")
