"""Uploads and downloads over HTTP, with a hub on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_hub import TOKEN, FakeHub, FakeRepository, running_hub

from library.training.hub import HubOptions, Uploader, fetch_state, uploader_of_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("library.core.secrets._secrets", set())
        yield hub


def options(**others: Any) -> HubOptions:
    return HubOptions(**{"huggingface_repo_id": "me/x", "huggingface_token": TOKEN, **others})


def uploader(**others: Any) -> Uploader:
    made = Uploader.of(options(**others))
    assert made is not None
    return made


def saved(folder: Path, name: str = "net.safetensors", content: bytes = b"weights") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_without_a_repository_there_is_no_uploader() -> None:
    assert Uploader.of(HubOptions()) is None


def test_the_main_process_of_a_run_has_the_uploader(hub: FakeHub) -> None:
    assert uploader_of_run(options(), cast(Any, SimpleNamespace(is_main_process=True, num_processes=1))) is not None
    assert uploader_of_run(options(), cast(Any, SimpleNamespace(is_main_process=False, num_processes=1))) is None


def test_a_repository_that_cannot_be_used_is_refused_on_every_rank(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True)
    hub.readers.add(TOKEN)
    monkeypatch.setattr("library.training.hub.uploader.broadcast_object_list", lambda found: ["said by the main process"])
    for is_main in (True, False):
        with pytest.raises(ValueError, match="said by the main process"):
            uploader_of_run(options(), cast(Any, SimpleNamespace(is_main_process=is_main, num_processes=2)))


def test_a_missing_repository_is_made_private(hub: FakeHub) -> None:
    uploader()
    assert hub.repositories["me/x"].private


def test_a_missing_repository_is_made_public_where_that_is_asked_for(hub: FakeHub) -> None:
    uploader(huggingface_repo_visibility="public")
    assert not hub.repositories["me/x"].private


def test_an_existing_repository_is_used_as_it_is(hub: FakeHub) -> None:
    hub.repositories["me/x"] = FakeRepository(private=False, files={"README.md": b"mine"})
    uploader()
    assert hub.repositories["me/x"] == FakeRepository(private=False, files={"README.md": b"mine"})


def test_a_public_repository_is_refused_where_files_shall_be_private(hub: FakeHub) -> None:
    hub.repositories["me/x"] = FakeRepository(private=False)
    with pytest.raises(ValueError, match="me/x is public"):
        uploader(huggingface_repo_visibility="private")


def test_a_private_repository_stays_so_and_that_is_said(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True)
    uploader(huggingface_repo_visibility="public")
    assert "me/x is private and stays so" in caplog.text


def test_a_token_that_may_only_read_is_refused_before_training_and_not_shown(hub: FakeHub) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True)
    hub.readers.add(TOKEN)
    with pytest.raises(ValueError, match="--huggingface_repo_id me/x: cannot write there") as error:
        uploader()
    assert TOKEN not in str(error.value) and "may only read" in str(error.value)


def test_no_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no access token"):
        uploader(huggingface_token=None)


def test_the_stored_login_is_used_where_no_token_is_given(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    uploader(huggingface_token=None)
    assert "me/x" in hub.repositories


def test_a_hub_that_does_not_answer_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="--huggingface_repo_id me/x: cannot write there"):
        uploader()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_saved_file_arrives_whole_in_its_folder(hub: FakeHub, tmp_path: Path, in_background: bool) -> None:
    sender = uploader(huggingface_path_in_repo="loras/cats", async_upload=in_background)
    sender.send(saved(tmp_path), "network")
    assert sender.finish() == []
    assert hub.repositories["me/x"].files == {"loras/cats/net.safetensors": b"weights"}


def test_a_state_goes_only_where_that_is_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    saved(tmp_path, "net-state/manifest.json")
    uploader().send(tmp_path / "net-state", "state")
    assert hub.repositories["me/x"].files == {}


def test_a_state_takes_the_place_of_the_earlier_one(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True, files={"net-state/rank-3": b"old", "other": b"mine"})
    saved(tmp_path, "net-state/manifest.json", b"{}")
    saved(tmp_path, "net-state/rank-0.safetensors")
    uploader(save_state_to_huggingface=True).send(tmp_path / "net-state", "state")
    assert hub.repositories["me/x"].files == {
        "other": b"mine",
        "net-state/manifest.json": b"{}",
        "net-state/rank-0.safetensors": b"weights",
    }


@pytest.mark.parametrize("in_background", [False, True])
def test_what_failed_is_warned_about_and_sent_at_the_end(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    sender = uploader(async_upload=in_background)
    hub.failures = 1
    sender.send(saved(tmp_path), "network")
    assert sender.finish() == []
    assert "the hub has a bad day" in caplog.text and TOKEN not in caplog.text
    assert "net.safetensors" in hub.repositories["me/x"].files


def test_what_cannot_be_sent_in_the_end_is_named_and_ends_nothing(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sender = uploader()
    hub.failures = 5
    path = saved(tmp_path)
    sender.send(path, "network")
    assert sender.finish() == [path]
    assert "not uploaded to me/x: net.safetensors" in caplog.text


def test_training_goes_on_while_files_go_up_in_their_order(hub: FakeHub, tmp_path: Path) -> None:
    sender = uploader(async_upload=True)
    hub.slowness.clear()
    for n in range(3):
        sender.send(saved(tmp_path, f"{n}.safetensors", bytes([n])), "network")
    assert hub.repositories["me/x"].files == {}
    hub.slowness.set()
    assert sender.finish() == []
    assert list(hub.repositories["me/x"].files) == [f"{n}.safetensors" for n in range(3)]


def test_what_comes_while_too_many_wait_goes_up_at_the_end(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.training.hub.uploader.MOST_WAITING", 1)
    sender = uploader(async_upload=True)
    hub.slowness.clear()
    for name in ("a", "b"):
        sender.send(saved(tmp_path, f"{name}.safetensors"), "network")
    assert "uploads are slower than saving: b.safetensors goes up at the end" in caplog.text
    hub.slowness.set()
    assert sender.finish() == [] and set(hub.repositories["me/x"].files) == {"a.safetensors", "b.safetensors"}


def test_several_processes_never_wait_for_an_upload(hub: FakeHub, tmp_path: Path) -> None:
    sender = Uploader.of(options(), processes=2)
    assert sender is not None
    hub.slowness.clear()
    sender.send(saved(tmp_path), "network")
    assert hub.repositories["me/x"].files == {}
    hub.slowness.set()
    assert sender.finish() == [] and len(hub.repositories["me/x"].files) == 1


def test_a_file_on_its_way_is_removed_after_it_arrived(hub: FakeHub, tmp_path: Path) -> None:
    sender = uploader(async_upload=True)
    hub.slowness.clear()
    path = saved(tmp_path)
    sender.send(path, "network")
    sender.release(path, path.unlink)
    assert path.is_file()
    hub.slowness.set()
    assert sender.finish() == [] and "net.safetensors" in hub.repositories["me/x"].files
    assert not path.exists()


def test_a_removal_that_fails_is_said_and_uploads_go_on(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sender = uploader(async_upload=True)
    hub.slowness.clear()
    for name in ("a", "b"):
        sender.send(saved(tmp_path, f"{name}.safetensors"), "network")
    sender.release(tmp_path / "a.safetensors", (tmp_path / "no such file").unlink)
    hub.slowness.set()
    assert sender.finish() == [] and len(hub.repositories["me/x"].files) == 2
    assert "cannot remove" in caplog.text


def test_a_file_that_was_sent_is_removed_at_once(hub: FakeHub, tmp_path: Path) -> None:
    sender = uploader()
    path = saved(tmp_path)
    sender.send(path, "network")
    sender.release(path, path.unlink)
    assert not path.exists()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_file_that_failed_and_is_no_longer_kept_is_given_up_and_said(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    sender = uploader(async_upload=in_background)
    hub.slowness.clear() if in_background else hub.slowness.set()
    hub.failures = 1
    path = saved(tmp_path)
    sender.send(path, "network")
    sender.release(path, path.unlink)
    hub.slowness.set()
    assert sender.finish() == [] and not path.exists()
    assert "net.safetensors is no longer kept, and was not uploaded to me/x" in caplog.text


def test_ctrl_c_at_the_end_names_what_is_not_uploaded(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = uploader(async_upload=True)
    hub.slowness.clear()
    sender.send(saved(tmp_path), "network")

    def interrupt(holds: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sender, "_wait_until", interrupt)
        sender.finish()
    assert "not uploaded to me/x: net.safetensors" in caplog.text
    hub.slowness.set()
    assert sender.finish() == []


@pytest.mark.parametrize("ends_with", [RuntimeError, SystemExit])
def test_a_run_that_fails_or_is_interrupted_still_uploads_what_it_saved(
    hub: FakeHub, tmp_path: Path, ends_with: type[BaseException]
) -> None:
    with pytest.raises(ends_with), uploader(async_upload=True) as sender:
        hub.slowness.clear()
        sender.send(saved(tmp_path), "network")
        hub.slowness.set()
        raise ends_with
    assert "net.safetensors" in hub.repositories["me/x"].files


def test_a_second_ctrl_c_does_not_wait(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), uploader(async_upload=True) as sender:
        hub.slowness.clear()
        sender.send(saved(tmp_path), "network")
        raise KeyboardInterrupt
    assert "not uploaded to me/x: net.safetensors" in caplog.text and hub.repositories["me/x"].files == {}
    hub.slowness.set()
    assert sender.finish() == []


def test_a_state_comes_back_as_it_went(hub: FakeHub, tmp_path: Path) -> None:
    saved(tmp_path, "net-state/manifest.json", b"{}")
    saved(tmp_path, "net-state/rank-0.safetensors")
    uploader(save_state_to_huggingface=True, huggingface_path_in_repo="runs").send(tmp_path / "net-state", "state")
    back = fetch_state(options(huggingface_repo_id=None), "me/x/runs/net-state:main", tmp_path / "fetched")
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {"manifest.json": b"{}", "rank-0.safetensors": b"weights"}
    asked = len(hub.requests)
    assert fetch_state(options(), "me/x/runs/net-state:main", tmp_path / "fetched") == back
    assert not any(request.startswith("GET /me/x/resolve") for request in hub.requests[asked:])


def test_a_state_that_is_not_there_is_refused_with_the_nearest(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True, files={"net-000004-state/manifest.json": b"{}"})
    with pytest.raises(ValueError, match=r"--resume me/x/net-000005-state: .*did you mean net-000004-state"):
        fetch_state(options(), "me/x/net-000005-state", tmp_path)


def test_a_repository_that_is_not_there_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume me/y/net-state"):
        fetch_state(options(), "me/y/net-state", tmp_path)


def test_the_token_is_in_no_file_that_a_fetched_state_leaves(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["me/x"] = FakeRepository(private=True, files={"net-state/manifest.json": b"{}"})
    fetch_state(options(), "me/x/net-state", tmp_path)
    files = [Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names]
    assert len(files) > 1 and not any(TOKEN.encode() in path.read_bytes() for path in files)
