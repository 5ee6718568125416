"""What does not fit on a disk is known before it is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from library.core import disk_space
from library.core.disk_space import amount, lacking, shortage


@pytest.fixture(autouse=True)
def disk_with_1000_bytes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))


@pytest.mark.parametrize(("needed", "reserve", "missing"), [(900, 100, 0), (901, 100, 1), (2000, 0, 1000), (0, 1001, 1)])
def test_the_shortage_counts_the_reserve(needed: int, reserve: int, missing: int, tmp_path: Path) -> None:
    assert shortage(tmp_path, needed, reserve) == missing


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    assert shortage(tmp_path / "a" / "b", 900, 100) == 0


def test_the_sentence_says_what_where_and_how_much(tmp_path: Path) -> None:
    assert lacking(tmp_path, 500, "a state", 500) is None
    assert lacking(tmp_path, 3048, "a state", 0) == (
        f"a state needs 3 KB in {tmp_path}, and 2 KB more must be free for it (with a reserve of 0 bytes)"
    )


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "2 KB"), (5 * 2**20, "5.0 MB"), (3 * 2**40, "3.0 TB")]
)
def test_amounts_read_well(size: int, text: str) -> None:
    assert amount(size) == text
