"""Files of tokenizers on disk and on the hub."""

from pathlib import Path

import pytest

from library.models.vocabulary_files import cache_folders, hub_folder, read_merges, read_table


def test_merges_are_the_pairs_of_the_lines_but_for_the_version(tmp_path: Path):
    path = tmp_path / "merges.txt"
    path.write_bytes("#version: 0.2\r\na b\r\n# c\r\n\u0120 d\n\n".encode())
    assert read_merges(path) == [("a", "b"), ("#", "c"), ("\u0120", "d")]


@pytest.mark.parametrize("content", ['{"a": ', "[1]"], ids=["broken", "a list"])
def test_what_is_no_table_is_named(tmp_path: Path, content: str):
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"vocab\.json: not"):
        read_table(path)


def test_a_cache_is_a_folder_or_a_hub_cache(tmp_path: Path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    assert cache_folders(tmp_path, "a/b") == [tmp_path, tmp_path / "a_b", snapshot]


def test_the_hub_is_not_asked_for_what_its_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []

    def download(_repository: str, name: str, *, cache_dir: Path | None, local_files_only: bool) -> str:
        asked.append(local_files_only)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub_folder("a/b", ("vocab.json", "merges.txt"), None) == tmp_path and asked == [True, True]


def test_offline_there_is_no_folder_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_folder("a/b", ("vocab.json",), tmp_path) is None
