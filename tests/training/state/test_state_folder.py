"""A state on disk is whole or named with what is wrong; a kill at any instant leaves one that is whole."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_state import small_manifest, small_state

from library.core.tensor_file import load_tensors
from library.training.state import folder as folders
from library.training.state.content import read_content
from library.training.state.folder import BrokenState, Manifest, StateNames, read_manifest, remove_state, staged_state, tidy, verified

FILES = ("manifest.json", "content.json", "weights.safetensors")


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleared up after it."""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return small_state(tmp_path / "net-step00000001-state")


def test_a_state_comes_back(state: Path) -> None:
    assert verified(state).step == 1 and read_content(state)["weights"]["a"].tolist() == [1.0 + n for n in range(8)]


def test_nothing_else_is_left_beside_a_state(state: Path) -> None:
    assert sorted(path.name for path in state.parent.iterdir()) == [state.name]
    assert sorted(path.name for path in state.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_shorter_file_is_noticed_and_named(name: str, state: Path) -> None:
    content = (state / name).read_bytes()
    for length in {*range(0, len(content), max(1, len(content) // 40)), len(content) - 1}:
        (state / name).write_bytes(content[:length])
        with pytest.raises(BrokenState, match=name):
            verified(state)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed_and_named(name: str, state: Path) -> None:
    content = (state / name).read_bytes()
    for byte in range(len(content)):
        flipped = bytearray(content)
        flipped[byte] ^= 1 << byte % 8
        (state / name).write_bytes(flipped)
        with pytest.raises(BrokenState, match=name):
            verified(state)


@pytest.mark.parametrize("name", FILES)
def test_a_longer_and_a_missing_file_are_named(name: str, state: Path) -> None:
    content = (state / name).read_bytes()
    (state / name).write_bytes(content + b"\n")
    with pytest.raises(BrokenState, match=name):
        verified(state)
    (state / name).unlink()
    with pytest.raises(BrokenState, match=f"{name}: missing"):
        verified(state)


def test_a_manifest_of_a_later_format_is_refused_by_its_number(state: Path) -> None:
    body = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").write_text(json.dumps({**body, "format": 9}))
    with pytest.raises(BrokenState, match="format 9, and this version reads 1"):
        read_manifest(state)


def test_a_manifest_reads_what_it_wrote() -> None:
    manifest = small_manifest(3, identity={"a": [1, "x"], "b": None, "c": 0.1})
    assert Manifest.parse(manifest.text()) == manifest


def instants(place: Path) -> Iterator[int]:
    """As many instants as replacing a state has calls of the system, told by making it once."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        _counted(patch, seen, None)
        small_state(place, 2)
    yield from range(len(seen) + 1)


def _counted(patch: pytest.MonkeyPatch, seen: list[str], last: int | None) -> None:
    """Note every call that changes the disk, and be killed before call number `last`."""
    places = [(os, "replace"), (shutil, "rmtree"), (os, "fsync"), (folders, "write_text")]
    for module, name in places:
        real = getattr(module, name)

        def call(*arguments: object, _real: object = real, _name: str = name, **named: object) -> object:
            if last is not None and len(seen) >= last:
                raise Killed
            seen.append(_name)
            return _real(*arguments, **named)  # pyright: ignore[reportCallIssue]

        patch.setattr(module, name, call)


def test_a_kill_at_any_call_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    count = max(instants(tmp_path / "count" / "net-state"))
    assert count > 8
    for last in range(count):
        place = small_state(tmp_path / str(last) / "net-state", 1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            _counted(patch, [], last)
            small_state(place, 2)
        tidy(StateNames(place.parent, "net"))
        assert verified(place).step in (1, 2), last
        assert [path.name for path in place.parent.iterdir()] == ["net-state"], last


def test_a_state_that_stood_aside_comes_back_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_state(tmp_path / ".net-state.old", 1)
    tidy(StateNames(tmp_path, "net"))
    assert verified(tmp_path / "net-state").step == 1 and "it is back" in caplog.text


def test_what_is_left_of_a_state_that_was_being_removed_goes(state: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        _counted(patch, [], 2)
        remove_state(state)
    assert [path.name for path in state.parent.iterdir()] == [f".{state.name}.gone"]
    tidy(StateNames(state.parent, "net"))
    assert not list(state.parent.iterdir())


def test_what_other_runs_left_is_not_cleared_up(tmp_path: Path) -> None:
    for name in (".other-state.part", ".net-extra-state.part", "net-state.part", ".net-note.part"):
        (tmp_path / name).mkdir()
    tidy(StateNames(tmp_path, "net"))
    assert len(list(tmp_path.iterdir())) == 4


def test_network_files_that_were_being_written_go(tmp_path: Path) -> None:
    own = (".net.safetensors.0123abcd.part", ".net-000001.safetensors.0123abcd.part", ".net-step00000001_ema.safetensors.0123abcd.part")
    others = (".net.safetensors.part", ".net2.safetensors.0123abcd.part", "net.safetensors")
    for name in (*own, *others):
        (tmp_path / name).touch()
    tidy(StateNames(tmp_path, "net"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize(("name", "is_own"), [
    ("net-state", True), ("net-000012-state", True), ("net-step00000120-state", True), ("net-step120-state", False), ("at-state", False),
    ("net-2-state", False), ("net.x-state", False), ("net-000012-state-old", False),
])  # fmt: skip
def test_names_are_those_of_this_output_name(name: str, is_own: bool, tmp_path: Path) -> None:
    assert StateNames(tmp_path, "net").owns(name) is is_own


def test_without_an_output_name_states_are_named_as_files_are(tmp_path: Path) -> None:
    names = StateNames(tmp_path, None)
    found = [names.place(kind, step=12, epoch=3).name for kind in ("end", "epoch", "step")]
    assert found == ["last-state", "epoch-000003-state", "at-step00000012-state"] and all(map(names.owns, found))


def test_a_disk_that_does_not_keep_what_was_written_is_noticed(tmp_path: Path) -> None:
    place = small_state(tmp_path / "net-state", 1)
    with pytest.raises(BrokenState, match="damaged"), staged_state(place) as part:
        shutil.copytree(place, part, dirs_exist_ok=True)
        file = part / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert verified(place).step == 1 and not (tmp_path / ".net-state.part").exists()


def test_a_full_disk_leaves_the_state_before_and_says_why(tmp_path: Path) -> None:
    place = small_state(tmp_path / "net-state", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores the signal, so that writing more is an error
    try:
        with pytest.raises(ValueError, match=r"weights.safetensors: could not be written \(File too large\)"):
            small_state(place, 2, size=4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert verified(place).step == 1 and [path.name for path in tmp_path.iterdir()] == ["net-state"]


def test_a_state_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.core.disk_space.shutil.disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, 100))
    with pytest.raises(ValueError, match=rf"it needs .* in {tmp_path}, and .* more must be free for it"):
        small_state(tmp_path / "net-state", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_state_holds_no_pickle(state: Path) -> None:
    load_tensors(state / "weights.safetensors")
    assert all(path.suffix in (".json", ".safetensors") for path in state.iterdir())
    assert not any(path.read_bytes().startswith((b"PK", b"\x80")) for path in state.iterdir())


def test_the_weights_of_a_state_are_kept_in_their_dtype(tmp_path: Path) -> None:
    from library.training.state.saving import write_state

    write_state(tmp_path / "net-state", {"weights": {"a": torch.ones(2, dtype=torch.bfloat16)}}, small_manifest())
    assert read_content(tmp_path / "net-state")["weights"]["a"].dtype == torch.bfloat16
