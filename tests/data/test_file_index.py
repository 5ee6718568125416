"""What is remembered of files: for as long as they stay as they are, across processes, and whatever became of the index itself."""

import json
import logging
import os
from pathlib import Path

import pytest

from library.core.file_hash import file_sha256
from library.data import file_index
from library.data.file_index import FileIndex


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes are read."""
    read: list[Path] = []
    monkeypatch.setattr(file_index, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    return read


def again(index: FileIndex) -> FileIndex:
    index.save()
    return FileIndex(index.folder)


def test_what_was_remembered_is_known_to_the_next_run(picture: Path, hashed: list[Path]) -> None:
    index = FileIndex(picture.parent)
    index.remember_size(picture, (3, 4), whole=True)
    wanted = index.content_hash(picture)
    index = again(index)
    assert (index.size(picture), index.is_whole(picture), index.content_hash(picture)) == ((3, 4), True, wanted)
    assert hashed == [picture]


@pytest.mark.parametrize("change", ["length", "date"])
def test_a_changed_file_is_unknown(picture: Path, hashed: list[Path], change: str) -> None:
    index = FileIndex(picture.parent)
    index.remember_size(picture, (3, 4), whole=True)
    index.content_hash(picture)
    now = picture.stat()
    picture.write_bytes(b"another" if change == "date" else b"longer picture")
    os.utime(picture, ns=(now.st_atime_ns, now.st_mtime_ns + (change == "date")))
    index = again(index)
    assert index.size(picture) is None and not index.is_whole(picture)
    assert index.content_hash(picture) == file_sha256(picture) and len(hashed) == 2


def test_a_size_read_from_the_header_does_not_undo_what_was_decoded(picture: Path) -> None:
    index = FileIndex(picture.parent)
    index.remember_size(picture, (3, 4), whole=True)
    index.remember_size(picture, (3, 4), whole=False)
    assert index.is_whole(picture)


@pytest.mark.parametrize(
    "broken", [b"", b"\xff\xfe", b"[]", b"{}", b'{"format": 1, "files": []}', b'{"format": 1, "files": {"a.png": [1]}}',
               b'{"format": 1, "files": {"a.png": ["7", 0, null, false, null]}}', b'{"format": 0, "files": {"a.png": []}}']
)  # fmt: skip
def test_a_broken_index_is_an_empty_one(picture: Path, broken: bytes) -> None:
    path = picture.parent / ".hadron_cache" / "files.json"
    path.parent.mkdir()
    path.write_bytes(broken)
    index = FileIndex(picture.parent)
    assert index.size(picture) is None
    index.remember_size(picture, (3, 4), whole=False)
    assert again(index).size(picture) == (3, 4)


def test_an_index_without_news_is_not_written(picture: Path) -> None:
    index = FileIndex(picture.parent)
    index.remember_size(picture, (3, 4), whole=False)
    index = again(index)
    index.path.unlink()
    index.remember_size(picture, (3, 4), whole=False)
    index.save()
    assert not index.path.exists()


def test_two_processes_keep_what_either_found(picture: Path) -> None:
    other = picture.with_name("b.png")
    other.write_bytes(b"other")
    one, two = FileIndex(picture.parent), FileIndex(picture.parent)
    one.remember_size(picture, (1, 1), whole=False)
    two.remember_size(other, (2, 2), whole=False)
    one.save()
    index = again(two)
    assert (index.size(picture), index.size(other)) == ((1, 1), (2, 2))


def test_files_that_are_gone_are_forgotten(picture: Path) -> None:
    index = FileIndex(picture.parent)
    index.remember_size(picture, (1, 1), whole=False)
    index.save()
    picture.rename(renamed := picture.with_name("b.png"))
    index.remember_size(renamed, (1, 1), whole=False)
    index.save()
    assert list(json.loads(index.path.read_text())["files"]) == ["b.png"]


def test_a_folder_that_cannot_be_written_to_is_no_error(picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    (picture.parent / ".hadron_cache").write_text("in the way")
    index = FileIndex(picture.parent)
    index.remember_size(picture, (1, 1), whole=False)
    with caplog.at_level(logging.WARNING):
        index.save()
    assert "files.json: could not be written" in caplog.text
