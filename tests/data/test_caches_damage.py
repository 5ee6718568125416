"""Caches heal: what is cut, flipped, empty or foreign is found and encoded anew, and never trained on."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from cache_samples import Vae, encoded_captions, encoded_images, entries
from dataset_samples import one_subset

from library.core.tensor_file import save_tensors
from library.data.caches import fill_latents
from library.data.caches.entries import read_entry, write_entry

SEEN_AT_START = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "empty": lambda raw: b"",
    "foreign": lambda raw: b"\xff" * len(raw),
    "a header only": lambda raw: b"\x02\0\0\0\0\0\0\0{}",
}


def flipped(path: Path, position: int) -> None:
    """Flip one bit."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", SEEN_AT_START.values(), ids=SEEN_AT_START.keys())
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_entry_is_encoded_again(make_folder, build, logs, kind, damage):
    folder = make_folder()
    data = build(one_subset(folder))
    fill = encoded_images if kind == "latents" else encoded_captions
    fill(data)
    captions = {path.name: read_entry(path).facts.get("caption") for path in entries(folder, kind)}
    entry = entries(folder, kind)[0]
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    again = fill(data)
    assert again == 1 or again == [captions[entry.name]]
    assert entry.read_bytes() == sound
    assert f"{kind}: 3 in the cache, 1 to encode, of which 1 replace a broken entry" in logs.text


def test_a_tensor_file_without_our_checksum_is_not_an_entry(make_folder, build):
    folder = make_folder()
    encoded_images(build(one_subset(folder)))
    save_tensors(entries(folder, "latents")[0], {"latents": torch.zeros(3, 8, 8)})
    assert encoded_images(build(one_subset(folder))) == 1


@pytest.mark.parametrize("where", ["tensor", "header"])
def test_a_flipped_bit_is_met_before_it_is_trained_on_and_healed_by_the_next_start(make_folder, build, where):
    folder = make_folder(sizes=[(64, 64)])
    data = build(one_subset(folder))
    encoded_images(data)
    [entry] = entries(folder, "latents")
    flipped(entry, -5 if where == "tensor" else entry.read_bytes().index(b"000.png"))
    assert encoded_images(data) == 0  # starting reads headers only
    with pytest.raises(ValueError, match=rf"{entry.name}: this entry of the cache is damaged .*the next start encodes it anew"):
        data.batch(0, 0)
    assert not entry.exists()
    plain = build(one_subset(folder)).batch(0, 0)
    assert encoded_images(data) == 1
    assert torch.equal(data.batch(0, 0).latents, Vae()(plain.pixels))


def test_a_flipped_bit_of_a_text_entry_is_met_too(make_folder, build):
    folder = make_folder(sizes=[(64, 64)])
    data = build(one_subset(folder))
    encoded_captions(data)
    flipped(entries(folder, "text")[0], -5)
    with pytest.raises(ValueError, match="the next start encodes it anew"):
        data.text.states("red, square, 0")
    assert encoded_captions(data) == ["red, square, 0"]


def test_an_entry_that_vanished_is_said_to_be_missing(make_folder, build):
    folder = make_folder(sizes=[(64, 64)])
    data = build(one_subset(folder))
    encoded_images(data)
    entries(folder, "latents")[0].unlink()
    with pytest.raises(ValueError, match="no such file"):
        data.batch(0, 0)


def test_without_the_check_a_file_that_exists_is_taken(make_folder, build):
    folder = make_folder()
    encoded_images(build(one_subset(folder)))
    truncated, gone = entries(folder, "latents")[:2]
    truncated.write_bytes(truncated.read_bytes()[:-1])
    gone.unlink()
    assert encoded_images(build(one_subset(folder), skip_cache_check=True)) == 1
    assert encoded_images(build(one_subset(folder))) == 1


def test_old_temporary_files_are_cleaned_and_young_ones_left(make_folder, build):
    folder = make_folder()
    data = build(one_subset(folder))
    (cache := folder / ".hadron_cache").mkdir(exist_ok=True)
    old, young = cache / ".latents-1.safetensors.0.part", cache / ".latents-2.safetensors.0.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    encoded_images(data)
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("to_disk", [False, True])
def test_all_images_that_cannot_be_decoded_are_named_at_once_and_the_others_kept(make_folder, build, to_disk):
    folder = make_folder(sizes=[(64, 64)] * 6)
    data = build(one_subset(folder))
    for name in ("001.png", "004.png"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:60] + b"\0" * (len(raw) - 60))
    with pytest.raises(ValueError, match=r"(?s)001\.png.*\n.*004\.png"):
        encoded_images(data, to_disk=to_disk)
    assert len(entries(folder, "latents")) == (4 if to_disk else 0)


def test_a_folder_that_cannot_be_written_to_is_named(make_folder, build):
    folder = make_folder()
    data = build(one_subset(folder))
    (folder / ".hadron_cache").write_text("in the way")
    with pytest.raises(ValueError, match=r"hadron_cache"):
        encoded_images(data)


def test_a_disk_that_is_full_is_named_with_what_helps(make_folder, build, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = make_folder()
    data = build(one_subset(folder))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"hadron_cache.*No space left.*keep the cache in memory: the option without _to_disk"):
        encoded_images(data)
    assert not list(folder.rglob("*.part"))


def test_an_entry_comes_back_as_it_was_written(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([], dtype=torch.bfloat16).reshape(0, 7), "c": torch.tensor(True)}
    write_entry(tmp_path / "x.safetensors", tensors, {"fact": "1"})
    entry = read_entry(tmp_path / "x.safetensors")
    assert entry.facts == {"fact": "1"} and entry.tensors.keys() == tensors.keys()
    assert all(torch.equal(entry.tensors[name], tensor) and entry.tensors[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_an_entry_that_another_process_healed_meanwhile_is_left_as_it_is(make_folder, build):
    folder = make_folder()
    data, vae = build(one_subset(folder)), Vae()
    encoded_images(data)
    sound = {entry: entry.read_bytes() for entry in entries(folder, "latents")}
    for entry in sound:
        entry.write_bytes(b"broken")

    def encode(pixels):
        for entry, raw in sound.items():
            entry.write_bytes(raw)
        return vae(pixels)

    fill_latents(data, encode, identity="vae 1", to_disk=True, batch_size=1)
    assert vae.images == 1
