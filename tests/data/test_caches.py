"""Caches: the same batches as without, kept across runs, renewed when something changed."""

import logging
from collections import Counter

import pytest
import torch
from cache_samples import TextEncoder, Vae, encoded_captions, encoded_images, entries
from dataset_samples import noise, one_subset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.caches import fill_latents
from library.data.caches.text import trimmed
from library.data.dataset import TrainingData

BUCKETED = "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32\nbatch_size = 2"
SIZES = [(64, 64)] * 3 + [(64, 96)] * 2


def masks(folder, sizes):
    """A folder of mask images for the images of another."""
    (made := folder.with_name("masks")).mkdir()
    for n, size in enumerate(sizes):
        Image.fromarray(noise(size, 100 + n)).save(made / f"{n:03d}.png")
    return made


# Latents


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_latents_are_those_of_the_pixels(make_folder, build, to_disk):
    data = build(one_subset(make_folder(sizes=SIZES), BUCKETED, "flip_aug = true\nnum_repeats = 4"))
    plain = [data.batch(0, position) for position in range(data.batches_per_epoch())]
    encoded_images(data, to_disk=to_disk)
    assert data.has_latents_in_memory is not to_disk
    flips = Counter(data.view(0, sample).crop.flipped for plan in data.order(0) for sample in plan.samples)
    assert min(flips[False], flips[True]) > 0
    for position, wanted in enumerate(plain):
        batch = data.batch(0, position)
        assert batch.pixels is None
        assert torch.equal(batch.latents, Vae()(wanted.pixels))
        assert torch.equal(batch.sizes.crop, wanted.sizes.crop)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("kind", ["mask image", "alpha"])
def test_cached_masks_are_those_of_the_images(make_folder, build, kind, to_disk):
    folder = make_folder(sizes=SIZES)
    if kind == "alpha":
        for n, size in enumerate(SIZES):
            Image.fromarray(noise(size, n, channels=4)).save(folder / f"{n:03d}.png")
    masked = "alpha_mask = true" if kind == "alpha" else f"conditioning_data_dir = '{masks(folder, SIZES).as_posix()}'"
    data = build(one_subset(folder, BUCKETED, f"{masked}\nflip_aug = true"), masked_loss=True)
    plain = [data.batch(0, position) for position in range(data.batches_per_epoch())]
    encoded_images(data, to_disk=to_disk)
    for position, wanted in enumerate(plain):
        batch = data.batch(0, position)
        assert wanted.mask is not None and wanted.mask.std() > 0
        assert torch.equal(batch.mask, wanted.mask) and torch.equal(batch.latents, Vae()(wanted.pixels))


def test_a_second_run_encodes_nothing(make_folder, build):
    text = one_subset(make_folder(sizes=SIZES), BUCKETED)
    assert encoded_images(build(text)) == 5
    assert encoded_images(build(text)) == 0


def test_a_second_run_reads_no_image(make_folder, build, monkeypatch):
    text = one_subset(make_folder(sizes=SIZES), BUCKETED)
    encoded_images(build(text))
    data = build(text)
    monkeypatch.setattr("library.data.file_index.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert encoded_images(data) == 0


def test_a_changed_image_is_encoded_again_and_a_renamed_one_is_not(make_folder, build):
    folder = make_folder(sizes=SIZES)
    text = one_subset(folder, BUCKETED)
    encoded_images(build(text))
    Image.new("RGB", (64, 64), "red").save(folder / "000.png")
    for ending in ("png", "txt"):
        (folder / f"001.{ending}").rename(folder / f"renamed.{ending}")
    data = build(text)
    assert encoded_images(data) == 1
    red = next(n for n, image in enumerate(data.images) if image.path.name == "000.png")
    assert data.latents.latents(red, False).latents[:, 0, 0].tolist() == [1, -1, -1]


def test_a_changed_mask_is_encoded_again(make_folder, build):
    folder = make_folder(sizes=SIZES)
    text = one_subset(folder, BUCKETED, f"conditioning_data_dir = '{(made := masks(folder, SIZES)).as_posix()}'")
    encoded_images(build(text, masked_loss=True))
    Image.new("RGB", SIZES[0], "white").save(made / "000.png")
    data = build(text, masked_loss=True)
    assert encoded_images(data) == 1
    assert data.latents.latents(0, False).mask.eq(1).all()


CHANGES = (
    ("resolution = 64", "resolution = 96"),
    ("enable_bucket = true", "enable_bucket = false"),
    ("batch_size", "resize_interpolation = 'nearest'\nbatch_size"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_another_resolution_crop_or_interpolation_has_its_own_entries(make_folder, build, change):
    text = one_subset(make_folder(sizes=[(64, 96)] * 2), BUCKETED)
    assert encoded_images(build(text)) == 2
    assert encoded_images(build(text.replace(*change))) == 2
    assert encoded_images(build(text)) == 0


def test_another_vae_has_its_own_entries(make_folder, build):
    data = build(one_subset(make_folder()))
    assert encoded_images(data, identity="one") == 4
    assert encoded_images(data, identity="two") == 4


def test_turning_flips_on_encodes_only_the_mirrored_images(make_folder, build):
    text = one_subset(make_folder())
    encoded_images(build(text))
    assert encoded_images(build(text + "flip_aug = true\n")) == 4


def test_latents_with_nan_are_refused_with_the_image(make_folder, build):
    data = build(one_subset(make_folder()))
    with pytest.raises(ValueError, match=r"not finite for .*000\.png"):
        fill_latents(data, lambda pixels: pixels[:, :, ::8, ::8] * float("nan"), identity="x", to_disk=False, batch_size=1)


def test_latents_are_kept_as_float32(make_folder, build):
    data = build(one_subset(make_folder()))
    fill_latents(data, lambda pixels: pixels[:, :, ::8, ::8].bfloat16(), identity="x", to_disk=False, batch_size=3)
    assert data.batch(0, 0).latents.dtype == torch.float32


@pytest.mark.parametrize("option", ["random_crop = true", "color_aug = true", "face_crop_aug_range = [1.0, 2.0]"])
def test_what_is_drawn_anew_at_each_use_cannot_be_cached(make_folder, build, option):
    data = build(one_subset(make_folder(), subset=option))
    with pytest.raises(ValueError, match=option.split()[0]):
        encoded_images(data, to_disk=False)


@pytest.mark.parametrize("to_disk", [False, True])
def test_images_held_out_for_validation_are_cached_too(make_folder, build, to_disk):
    data = build(one_subset(make_folder(sizes=SIZES), BUCKETED, "validation_split = 0.4\nflip_aug = true"))
    assert isinstance(data.validation, TrainingData)
    plain = data.validation.batch(0, 0).pixels
    assert encoded_images(data, to_disk=to_disk) == 3 * 2 + 2
    encoded_captions(data, to_disk=to_disk)
    batch = data.validation.batch(0, 0)
    assert plain is not None and batch.latents is not None and batch.text is not None
    assert torch.equal(batch.latents, Vae()(plain))
    assert torch.equal(batch.text["mask"], TextEncoder()(batch.captions)["mask"])


def test_the_log_says_how_much_was_encoded_and_how_fast(make_folder, build, caplog):
    with caplog.at_level(logging.INFO):
        encoded_images(build(one_subset(make_folder())))
    assert "latents: 0 in the cache, 4 to encode" in caplog.text and "latents: 4 encoded in" in caplog.text


# Text


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_text_is_that_of_the_captions_read(make_folder, build, to_disk):
    options = "caption_prefix = 'p'\nsecondary_separator = 'q'\ncaption_dropout_rate = 0.5\nnum_repeats = 4"
    data = build(one_subset(make_folder(), "batch_size = 3", options))
    captions = encoded_captions(data, to_disk=to_disk)
    assert "" in captions and "p red, s,uare, 0" in captions
    seen = set()
    for position in range(data.batches_per_epoch()):
        batch = data.batch(0, position)
        for name, states in TextEncoder()(batch.captions).items():
            assert torch.equal(batch.text[name], states)
            assert batch.text[name].dtype == states.dtype
        seen |= set(batch.captions)
    assert "" in seen


def test_a_caption_is_encoded_once_however_many_images_have_it(make_folder, build):
    assert encoded_captions(build(one_subset(make_folder(caption="same"))), to_disk=False) == ["same"]


def test_every_caption_that_wildcards_draw_is_cached(make_folder, build):
    data = build(one_subset(make_folder(caption="a {{red|blue}} cat {n}"), subset="enable_wildcard = true\nnum_repeats = 8"))
    assert sorted(encoded_captions(data)) == sorted(f"a {colour} cat {n}" for colour in ("red", "blue") for n in range(4))
    drawn = {caption for position in range(data.batches_per_epoch()) for caption in data.batch(0, position).captions}
    assert len(drawn) == 8


def test_more_captions_than_can_be_cached_are_refused_with_what_helps(make_folder, build):
    data = build(one_subset(make_folder(caption="{{a|b|c|d|e}}" * 3), subset="enable_wildcard = true"))
    with pytest.raises(ValueError, match="--text_cache_variants"):
        encoded_captions(data)


def test_shuffled_captions_are_drawn_from_the_variants_that_are_cached(make_folder, build):
    text = one_subset(
        make_folder(caption="a, b, c, d, e, {n}"), subset="shuffle_caption = true\nnum_repeats = 6\ncaption_dropout_rate = 0.2"
    )
    data = build(text, cache_text_encoder_outputs=True, text_cache_variants=3)
    captions = encoded_captions(data)
    assert "" in captions and 4 < len(captions) <= 13
    for epoch in range(3):
        for position in range(data.batches_per_epoch()):
            batch = data.batch(epoch, position)
            assert torch.equal(batch.text["hidden_states"], TextEncoder()(batch.captions)["hidden_states"])


def test_an_edited_caption_and_a_changed_prefix_are_encoded_again(make_folder, build):
    folder = make_folder()
    encoded_captions(build(one_subset(folder)))
    (folder / "002.txt").write_text("edited")
    assert encoded_captions(build(one_subset(folder))) == ["edited"]
    assert len(encoded_captions(build(one_subset(folder, subset="caption_prefix = 'p'")))) == 4


@pytest.mark.parametrize("option", ["shuffle_caption = true", "token_warmup_step = 10", "caption_tag_dropout_rate = 0.1"])
def test_text_that_varies_cannot_be_cached(make_folder, build, option):
    data = build(one_subset(make_folder(), subset=option))
    with pytest.raises(ValueError, match=option.split()[0]):
        encoded_captions(data, to_disk=False)


def test_rows_of_padding_take_no_room(make_folder, build):
    folder = make_folder(caption="ab{n}")
    encoded_captions(build(one_subset(folder)))
    assert all(entry.stat().st_size < 700 for entry in entries(folder, "text"))  # 12 rows of two floats and an index take 192 bytes more


ROWS = st.lists(st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("nan")]), min_size=2, max_size=2)


@given(st.lists(ROWS, min_size=0, max_size=5), st.integers(0, 3))
def test_what_is_trimmed_comes_back_bit_for_bit(rows, padding):
    tensor = torch.tensor(rows + [[0.0, 0.0]] * padding).reshape(-1, 2)
    short = trimmed({"x": tensor, "flat": tensor[:, 0]})
    whole = short.whole()
    assert len(short.tensors["x"]) <= len(rows)
    assert whole["x"].numpy().tobytes() == tensor.numpy().tobytes()
    assert whole["flat"].numpy().tobytes() == tensor[:, 0].contiguous().numpy().tobytes()
