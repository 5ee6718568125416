"""Caches: the same batches as without, kept across runs, renewed when something changed or broke."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from dataset_samples import one_subset
from PIL import Image
from torch import Tensor

from library.data.caches import fill_latents, fill_text

BUCKETED = "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32\nbatch_size = 2"
SIZES = [(64, 64)] * 3 + [(64, 96)] * 2


class Vae:
    """Means of 8x8 squares; counts the images it sees."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8)


class TextEncoder:
    """Each caption's length and letters; keeps what it was asked."""

    def __init__(self) -> None:
        self.captions: list[str] = []

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        self.captions += captions
        rows = [[float(sum(map(ord, caption))), float(len(caption))] for caption in captions]
        return {"hidden_states": torch.tensor(rows)[:, None, :], "pooled": torch.tensor(rows, dtype=torch.bfloat16)}


def latents(data, vae: Vae, *, to_disk: bool = True, identity: str = "vae 1") -> int:
    """Fill, and say how many images were encoded."""
    before = vae.images
    fill_latents(data, vae, identity=identity, to_disk=to_disk, batch_size=2)
    return vae.images - before


def entries(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / ".hadron_cache").glob(f"{kind}-*.safetensors"))


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_latents_are_those_of_the_pixels(make_folder, build, to_disk):
    data = build(one_subset(make_folder(sizes=SIZES), BUCKETED, "flip_aug = true\nnum_repeats = 4"))
    plain = [data.batch(0, position) for position in range(data.batches_per_epoch())]
    latents(data, Vae(), to_disk=to_disk)
    assert data.has_latents_in_memory is not to_disk
    flips = Counter(data.view(0, sample).flipped for plan in data.order(0) for sample in plan.samples)
    assert min(flips[False], flips[True]) > 0
    for position, wanted in enumerate(plain):
        batch = data.batch(0, position)
        assert batch.pixels is None
        assert torch.equal(batch.latents, Vae()(wanted.pixels))
        assert torch.equal(batch.sizes.crop, wanted.sizes.crop)


def test_a_second_run_encodes_nothing(make_folder, build):
    text = one_subset(make_folder(sizes=SIZES), BUCKETED)
    assert latents(build(text), Vae()) == 5
    assert latents(build(text), Vae()) == 0


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"\xff" * len(raw)])
def test_a_broken_entry_is_encoded_again(make_folder, build, damage):
    folder = make_folder(sizes=SIZES)
    data = build(one_subset(folder, BUCKETED))
    latents(data, Vae())
    entry = entries(folder, "latents")[0]
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert latents(data, Vae()) == 1
    assert entry.read_bytes() == sound


def test_a_changed_image_is_encoded_again_and_a_renamed_one_is_not(make_folder, build):
    folder = make_folder(sizes=SIZES)
    text = one_subset(folder, BUCKETED)
    latents(build(text), Vae())
    Image.new("RGB", (64, 64), "red").save(folder / "000.png")
    for ending in ("png", "txt"):
        (folder / f"001.{ending}").rename(folder / f"renamed.{ending}")
    data = build(text)
    assert latents(data, Vae()) == 1
    red = next(n for n, image in enumerate(data.images) if image.path.name == "000.png")
    assert data.latents.latents(red, False)[:, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("change", [("resolution = 64", "resolution = 96"), ("enable_bucket = true", "enable_bucket = false")])
def test_another_resolution_or_crop_has_its_own_entries(make_folder, build, change):
    text = one_subset(make_folder(sizes=[(64, 96)] * 2), BUCKETED)
    assert latents(build(text), Vae()) == 2
    assert latents(build(text.replace(*change)), Vae()) == 2
    assert latents(build(text), Vae()) == 0


def test_another_vae_has_its_own_entries(make_folder, build):
    data = build(one_subset(make_folder()))
    assert latents(data, Vae(), identity="one") == 4
    assert latents(data, Vae(), identity="two") == 4


def test_turning_flips_on_encodes_only_the_mirrored_images(make_folder, build):
    text = one_subset(make_folder())
    latents(build(text), Vae())
    assert latents(build(text + "flip_aug = true\n"), Vae()) == 4


def test_latents_with_nan_are_refused_with_the_image(make_folder, build):
    data = build(one_subset(make_folder()))
    with pytest.raises(ValueError, match=r"not finite for .*000\.png"):
        fill_latents(data, lambda pixels: pixels[:, :, ::8, ::8] * float("nan"), identity="x", to_disk=False, batch_size=1)


def test_latents_are_kept_as_float32(make_folder, build):
    data = build(one_subset(make_folder()))
    fill_latents(data, lambda pixels: pixels[:, :, ::8, ::8].bfloat16(), identity="x", to_disk=False, batch_size=3)
    assert data.batch(0, 0).latents.dtype == torch.float32


def test_random_crops_cannot_be_cached(make_folder, build):
    data = build(one_subset(make_folder(), subset="random_crop = true"))
    with pytest.raises(ValueError, match="random_crop"):
        latents(data, Vae(), to_disk=False)


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_text_is_that_of_the_captions_read(make_folder, build, to_disk):
    options = "caption_prefix = 'p'\nsecondary_separator = 'q'\ncaption_dropout_rate = 0.5\nnum_repeats = 4"
    data = build(one_subset(make_folder(), "batch_size = 3", options))
    encoder = TextEncoder()
    fill_text(data, encoder, identity="te", to_disk=to_disk, batch_size=2)
    assert "" in encoder.captions
    assert "p red, s,uare, 0" in encoder.captions
    seen = set()
    for position in range(data.batches_per_epoch()):
        batch = data.batch(0, position)
        for name, states in TextEncoder()(batch.captions).items():
            assert torch.equal(batch.text[name], states)
            assert batch.text[name].dtype == states.dtype
        seen |= set(batch.captions)
    assert "" in seen


def test_a_caption_is_encoded_once_however_many_images_have_it(make_folder, build):
    encoder = TextEncoder()
    fill_text(build(one_subset(make_folder(caption="same"))), encoder, identity="te", to_disk=False, batch_size=8)
    assert encoder.captions == ["same"]


def test_an_edited_caption_and_a_changed_prefix_are_encoded_again(make_folder, build):
    folder = make_folder()
    fill_text(build(one_subset(folder)), TextEncoder(), identity="te", to_disk=True, batch_size=8)
    (folder / "002.txt").write_text("edited")
    edited, prefixed = TextEncoder(), TextEncoder()
    fill_text(build(one_subset(folder)), edited, identity="te", to_disk=True, batch_size=8)
    fill_text(build(one_subset(folder, subset="caption_prefix = 'p'")), prefixed, identity="te", to_disk=True, batch_size=8)
    assert edited.captions == ["edited"]
    assert len(prefixed.captions) == 4


def test_a_broken_text_entry_is_encoded_again(make_folder, build):
    folder = make_folder()
    data = build(one_subset(folder))
    fill_text(data, TextEncoder(), identity="te", to_disk=True, batch_size=8)
    entry = entries(folder, "text")[0]
    entry.write_bytes(entry.read_bytes()[:-1])
    encoder = TextEncoder()
    fill_text(data, encoder, identity="te", to_disk=True, batch_size=8)
    assert len(encoder.captions) == 1


@pytest.mark.parametrize("option", ["shuffle_caption = true", "enable_wildcard = true", "caption_tag_dropout_rate = 0.1"])
def test_text_that_varies_cannot_be_cached(make_folder, build, option):
    data = build(one_subset(make_folder(), subset=option))
    with pytest.raises(ValueError, match=option.split()[0]):
        fill_text(data, TextEncoder(), identity="te", to_disk=False, batch_size=1)
