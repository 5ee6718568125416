"""sd-scripts' caches beside the images: used in place where all that they say fits, else encoded anew and counted by reason."""

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import LENGTH, TextEncoder, Vae, encoded_captions, encoded_images, entries
from dataset_samples import noise, one_subset
from PIL import Image

from library.data.caches import NpzLatents, NpzText
from library.data.images.masks import pooled_mask

SIZE = (64, 96)
FLIPS = "flip_aug = true"
BUCKETED = "enable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 32\nresolution = [64, 96]"


def halved(latents):
    return latents * 0.5


def states(arrays):
    return {"hidden_states": torch.from_numpy(arrays["hidden"]), "mask": torch.from_numpy(arrays["mask"]),
            "pooled": torch.from_numpy(arrays["pool"]).bfloat16()}  # fmt: skip


LATENTS = NpzLatents(suffix="_toy.npz", channels=3, pixels=8, ready=halved)
TEXT = NpzText(suffix="_toy_te.npz", shapes={"hidden": (LENGTH, 2), "mask": (LENGTH,), "pool": (2,)}, ready=states)


def dataset(folder: Path, subset: str = "") -> str:
    return one_subset(folder, subset=subset).replace("resolution = 64\n", BUCKETED + "\n")


def later(*paths: Path) -> None:
    """Date files an hour ahead."""
    then = time.time() + 3600
    for path in paths:
        os.utime(path, (then, then))


def write_latents(data, *, suffix: str = "", change=None, flip: bool = True) -> list[Path]:
    """The files that sd-scripts would have left for the images of a dataset; `change` changes the arrays of the first."""
    paths = []
    for image in data.images:
        vae = Vae()
        arrays: dict[str, Any] = {"original_size": np.array(image.size), "crop_ltrb": np.zeros(4)}
        for name, flipped in (("latents", False), ("latents_flipped", True))[: 1 + flip]:
            pixels = torch.from_numpy(np.array(Image.open(image.path).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
            arrays[name] = 2 * vae((pixels.flip(2) if flipped else pixels)[None])[0].numpy()
        if image.path.name == "000.png" and change:
            change(arrays)
        width, height = image.size
        paths.append(image.path.with_name(f"{image.path.stem}_{width:04d}x{height:04d}_toy.npz"))
        stored: dict[str, Any] = {name + suffix: array for name, array in arrays.items()}
        np.savez(paths[-1], **stored)
    return paths


def write_text(data, change=None) -> list[Path]:
    paths = []
    for image in data.images:
        found = {name: tensor[0] for name, tensor in TextEncoder()([image.caption]).items()}
        arrays: dict[str, Any] = {
            "hidden": found["hidden_states"].numpy(),
            "mask": found["mask"].numpy(),
            "pool": found["pooled"].float().numpy(),
        }
        if image.path.name == "000.png" and change:
            change(arrays)
        paths.append(image.path.with_name(f"{image.path.stem}_toy_te.npz"))
        np.savez(paths[-1], **arrays)
    return paths


# Latents


@pytest.mark.parametrize("suffix", ["", "_12x8"])
def test_latents_of_sd_scripts_are_used_in_place(make_folder, build, logs, suffix):
    folder = make_folder(sizes=[SIZE] * 3)
    data = build(dataset(folder, FLIPS))
    plain = build(dataset(folder, FLIPS)).batch(0, 0)
    write_latents(data, suffix=suffix)
    assert encoded_images(data, npz=LATENTS) == 1  # the one that is compared
    torch.testing.assert_close(data.batch(0, 0).latents, Vae()(plain.pixels))
    assert not entries(folder, "latents")
    assert "latents: 0 in the cache, 6 in files of sd-scripts, 0 to encode" in logs.text


CHANGES = {
    "made from an image of another size": lambda arrays: arrays.update(original_size=np.array([96, 96])),
    "without latents of this size": lambda arrays: arrays.update(latents=np.zeros((3, 8, 8), np.float32)),
    "without mirrored latents of this size": lambda arrays: arrays.pop("latents_flipped"),
}


@pytest.mark.parametrize(("reason", "change"), CHANGES.items(), ids=CHANGES.keys())
def test_a_file_that_does_not_fit_is_encoded_anew_and_counted(make_folder, build, logs, reason, change):
    data = build(dataset(make_folder(sizes=[SIZE] * 3), FLIPS))
    write_latents(data, change=change)
    anew = 2 if "another size" in reason else 1
    assert encoded_images(data, npz=LATENTS) == 1 + anew
    assert f"{anew} {reason}" in logs.text


def test_a_file_older_than_its_image_is_encoded_anew(make_folder, build, logs):
    folder = make_folder(sizes=[SIZE] * 3)
    data = build(dataset(folder))
    write_latents(data)
    later(folder / "001.png")
    assert encoded_images(data, npz=LATENTS) == 2
    assert "1 older than their image" in logs.text


@pytest.mark.parametrize("broken", [b"", b"PK\x03\x04 cut short"])
def test_a_file_that_cannot_be_read_is_encoded_anew(make_folder, build, logs, broken):
    data = build(dataset(make_folder(sizes=[SIZE] * 3)))
    write_latents(data)[1].write_bytes(broken)
    assert encoded_images(data, npz=LATENTS) == 2
    assert "1 not readable (BadZipFile)" in logs.text


def test_an_encrypted_file_is_encoded_anew(make_folder, build, logs):
    data = build(dataset(make_folder(sizes=[SIZE] * 3)))
    path = write_latents(data)[1]
    raw = bytearray(path.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of each entry, and of each line of the directory
        for found in re.finditer(re.escape(start), bytes(raw)):
            raw[found.start() + flags] |= 1
    path.write_bytes(raw)
    assert encoded_images(data, npz=LATENTS) == 2
    assert "1 not readable (RuntimeError)" in logs.text


PICKLED = {
    "original_size": lambda arrays: np.array([{}, {}], dtype=object),
    "latents": lambda arrays: arrays["latents"].astype(object),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickled_arrays_are_not_read(make_folder, build, name):
    data = build(dataset(make_folder(sizes=[SIZE] * 2)))
    write_latents(data, change=lambda arrays: arrays.update({name: PICKLED[name](arrays)}))
    encoded_images(data, npz=LATENTS)
    plain = Vae()(build(dataset(data.images[0].path.parent)).batch(0, 0).pixels)
    torch.testing.assert_close(data.batch(0, 0).latents, plain)


def test_a_link_to_nothing_is_no_cache(make_folder, build):
    folder = make_folder(sizes=[SIZE] * 2)
    data = build(dataset(folder))
    write_latents(data)
    (folder / "gone.npz").symlink_to(folder / "nowhere")
    assert encoded_images(data, npz=LATENTS) == 1


def test_an_image_that_sd_scripts_saw_upside_down_is_encoded_anew(make_folder, build, logs):
    folder = make_folder(sizes=[SIZE] * 3)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(noise(SIZE, 1)).save(folder / "001.png", exif=exif)
    data = build(dataset(folder))
    write_latents(data)
    assert encoded_images(data, npz=LATENTS) == 2
    assert "1 made from an image that lies on its side or its head" in logs.text


def test_latents_that_are_not_finite_are_named_when_they_are_read(make_folder, build):
    data = build(dataset(make_folder(sizes=[SIZE] * 3)))
    path = write_latents(data)[1]
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "latents": arrays["latents"] * np.nan})
    encoded_images(data, npz=LATENTS)
    with pytest.raises(ValueError, match=f"{path.name}: .* not finite"):
        data.latents.latents(1, False)


def test_files_of_another_vae_are_not_used(make_folder, build, logs):
    data = build(dataset(make_folder(sizes=[SIZE] * 3)))
    write_latents(data, change=lambda arrays: arrays.update(latents=-arrays["latents"]))
    assert encoded_images(data, npz=LATENTS) == 1 + 3
    assert "3 files of sd-scripts are not used: the latents in" in logs.text and "differ by 200 %" in logs.text


def test_a_damaged_body_is_named_when_it_is_read(make_folder, build):
    data = build(dataset(make_folder(sizes=[SIZE] * 3)))
    path = write_latents(data)[2]
    encoded_images(data, npz=LATENTS)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"latents.npy") + 300] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{path.name}: this file of sd-scripts' cache is damaged"):
        data.latents.latents(2, False)


def test_own_entries_win(make_folder, build):
    data = build(dataset(make_folder(sizes=[SIZE] * 2)))
    encoded_images(data)
    write_latents(data)
    assert encoded_images(data, npz=LATENTS) == 0
    assert not data.latents.places


def test_in_memory_no_file_is_read(make_folder, build):
    data = build(dataset(make_folder(sizes=[SIZE] * 2)))
    write_latents(data)
    assert encoded_images(data, to_disk=False, npz=LATENTS) == 2


@pytest.mark.parametrize("at_latents_size", [False, True])
def test_an_alpha_mask_is_read_where_it_is_wanted_and_mirrored_with_its_image(make_folder, build, at_latents_size):
    folder = make_folder(sizes=[SIZE] * 2)
    for n in range(2):
        Image.fromarray(noise(SIZE, n, channels=4)).save(folder / f"{n:03d}.png")
    mask = torch.rand(12, 8) if at_latents_size else torch.rand(96, 64)
    data = build(dataset(folder, f"{FLIPS}\nalpha_mask = true"))
    write_latents(data, change=lambda arrays: arrays.update(alpha_mask=mask.numpy()))
    assert encoded_images(data, npz=LATENTS) == 1 + 2  # the second has no mask
    wanted = pooled_mask(mask, 12, 8)
    torch.testing.assert_close(data.latents.latents(0, False).mask, wanted)
    torch.testing.assert_close(data.latents.latents(0, True).mask, wanted.flip(1))


def test_an_alpha_mask_that_is_not_wanted_is_not_applied(make_folder, build):
    data = build(dataset(make_folder(sizes=[SIZE] * 2)))
    write_latents(data, change=lambda arrays: arrays.update(alpha_mask=np.zeros((96, 64), np.float32)))
    encoded_images(data, npz=LATENTS)
    assert data.batch(0, 0).mask is None


def test_a_file_whose_name_tells_no_vae_is_not_used_and_said_once(make_folder, build, logs):
    data = build(dataset(make_folder(sizes=[SIZE] * 2)))
    for path in write_latents(data):
        path.rename(path.with_name(path.name[:3] + ".npz"))
    assert encoded_images(data, npz=LATENTS) == 2
    assert logs.text.count("2 files such as 000.npz are not used") == 1


# Text


def test_text_of_sd_scripts_is_used_in_place(make_folder, build, logs):
    folder = make_folder()
    data = build(one_subset(folder, subset="caption_dropout_rate = 0.5\nnum_repeats = 3"))
    write_text(data)
    assert sorted(encoded_captions(data, npz=TEXT)) == ["", "red, square, 0"]  # the empty one, and the one that is compared
    assert len(entries(folder, "text")) == 1
    assert "text: 0 in the cache, 4 in files of sd-scripts, 1 to encode" in logs.text
    for position in range(data.batches_per_epoch()):
        batch = data.batch(0, position)
        for name, wanted in TextEncoder()(batch.captions).items():
            assert torch.equal(batch.text[name], wanted)


def test_text_is_encoded_anew_where_the_caption_is_not_the_one_in_the_file(make_folder, build, logs):
    data = build(one_subset(make_folder(), subset="caption_prefix = 'p'"))
    write_text(data)
    assert len(encoded_captions(data, npz=TEXT)) == 4
    assert "4 made from the caption without prefix" in logs.text


def test_text_is_encoded_anew_where_the_caption_file_is_newer(make_folder, build, logs):
    folder = make_folder()
    data = build(one_subset(folder))
    write_text(data)
    later(folder / "001.txt", folder / "002.txt")
    assert sorted(encoded_captions(data, npz=TEXT)) == ["red, square, 0", "red, square, 1", "red, square, 2"]
    assert "2 older than their caption" in logs.text


def test_text_of_another_length_is_encoded_anew(make_folder, build, logs):
    data = build(one_subset(make_folder()))
    write_text(data, lambda arrays: arrays.update(mask=np.zeros(LENGTH + 1, np.int64)))
    assert sorted(encoded_captions(data, npz=TEXT)) == ["red, square, 0", "red, square, 1"]
    assert f"1 without mask of shape {LENGTH}" in logs.text


def test_text_of_other_encoders_is_not_used(make_folder, build, logs):
    data = build(one_subset(make_folder()))
    write_text(data, lambda arrays: arrays.update(pool=arrays["pool"] * 1.5))
    assert len(encoded_captions(data, npz=TEXT)) == 1 + 4
    assert "4 files of sd-scripts are not used: the states in" in logs.text and "differ by 50 %" in logs.text
