"""Folders of images: the naming convention, captions found or missing, and bad input named all at once."""

from pathlib import Path

import pytest
from dataset_samples import one_subset

from library.core.options import OptionError


def problems(build, text: str = "", **options) -> str:
    with pytest.raises(OptionError) as caught:
        build(text, **options)
    return str(caught.value)


def test_folder_names_give_repeats_and_class_tokens(make_folder, build, tmp_path):
    make_folder("train/3_a cat_x", [(64, 64)] * 2, caption=None)
    make_folder("train/notes", [(64, 64)])
    data = build(train_data_dir=tmp_path / "train", resolution=64)
    assert [(image.repeats, image.caption) for image in data.images] == [(3, "a cat_x")] * 2
    assert data.num_train_images == 6


def test_without_named_folders_the_convention_is_explained(make_folder, build, tmp_path):
    make_folder("train", [(64, 64)])
    assert "has no folder named <repeats>_<class tokens>" in problems(build, train_data_dir=tmp_path / "train")


def test_without_any_folder_both_ways_are_named(build):
    assert problems(build) == "no images to train with; give --dataset_config FILE, or --train_data_dir FOLDER"


def test_missing_and_empty_folders_and_broken_images_are_reported_together(make_folder, build, tmp_path):
    bad = make_folder("bad", [(64, 64)] * 3)
    (bad / "000.png").write_bytes(b"no image")
    (bad / "001.png").write_bytes(b"")
    (bad / "002.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    names = ("bad", "empty", "missing")
    found = problems(build, "[[datasets]]\n" + "".join(f"[[datasets.subsets]]\nimage_dir = '{tmp_path / name}'\n" for name in names))
    assert "000.png: cannot be read" in found
    assert "001.png: cannot be read" in found
    assert "002.txt: not UTF-8" in found
    assert "empty: has no images" in found
    assert "missing: no such folder" in found


def test_regularisation_is_not_blamed_for_training_images_that_cannot_be_read(make_folder, build, tmp_path):
    text = one_subset(tmp_path / "missing") + f"[[datasets.subsets]]\nimage_dir = '{make_folder().as_posix()}'\nis_reg = true\n"
    found = problems(build, text)
    assert "missing: no such folder" in found and "regularisation images only" not in found


def test_txt_captions_are_found_and_said_when_caption_is_the_default(make_folder, build, logs):
    data = build(one_subset(make_folder()))
    assert data.images[1].caption == "red, square, 1"
    assert "captions are read from .txt files" in logs.text


def test_a_caption_file_wins_over_txt(make_folder, build):
    folder = make_folder()
    (folder / "000.caption").write_text("from caption")
    assert build(one_subset(folder)).images[0].caption == "from caption"


def test_an_extension_that_was_asked_for_is_the_only_one(make_folder, build):
    assert "no image has a caption file (.cap)" in problems(build, one_subset(make_folder(), subset="caption_extension = 'cap'"))


def test_images_without_any_caption_are_refused(make_folder, build):
    found = problems(build, one_subset(make_folder(caption=None)))
    assert "no image has a caption file (.caption or .txt)" in found


def test_a_single_missing_caption_is_refused_unless_an_empty_one_is_asked_for(make_folder, build):
    folder = make_folder()
    (folder / "002.txt").unlink()
    assert '1 images have no .caption or .txt file: 002.png; write captions, or give class_tokens ("" for none)' in problems(
        build, one_subset(folder)
    )
    assert build(one_subset(folder, subset="class_tokens = ''")).images[2].caption == ""


def test_class_tokens_stand_in_for_missing_captions(make_folder, build):
    folder = make_folder()
    (folder / "002.txt").unlink()
    data = build(one_subset(folder, subset="class_tokens = 'sks dog'"))
    assert [image.caption for image in data.images[1:3]] == ["red, square, 1", "sks dog"]


def test_images_of_kinds_that_are_not_read_are_named(make_folder, build, logs):
    folder = make_folder()
    (folder / "x.heic").touch()
    build(one_subset(folder))
    assert "1 images are left out: x.heic (convert" in logs.text


@pytest.mark.parametrize(("number", "repeats"), [(2, [3, 3]), (4, [2, 2, 1, 1]), (9, [1] * 6)])
def test_regularisation_images_are_balanced(make_folder, build, number, repeats):
    train, reg = make_folder("train", [(64, 64)] * 3), make_folder("reg", [(64, 64)] * number)
    text = one_subset(train, subset="num_repeats = 2") + f"[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true\n"
    data = build(text, prior_loss_weight=0.5)
    assert [image.repeats for image in data.images if image.options.is_reg] == repeats
    assert data.num_reg_images == data.num_train_images == 6
    for position in range(data.batches_per_epoch()):
        batch = data.batch(0, position)
        assert batch.loss_weights.tolist() == [0.5 if Path(path).parent.name == "reg" else 1.0 for path in batch.images]


def test_regularisation_images_alone_are_refused(make_folder, build):
    assert "regularisation images only" in problems(build, one_subset(make_folder(), subset="is_reg = true"))


def test_a_resolution_that_the_model_cannot_take_names_the_nearest(make_folder, build):
    text = one_subset(make_folder()).replace("resolution = 64", "resolution = 100")
    assert "data.toml line 2 ([[datasets]] 1): resolution: 100x100: the model needs multiples of 32; try 96x96" in problems(build, text)


def test_what_cannot_be_cached_is_refused_before_any_model_is_loaded(make_folder, build):
    text = one_subset(make_folder(), subset="random_crop = true\ncolor_aug = true\nshuffle_caption = true\ntoken_warmup_step = 5")
    found = problems(build, text, cache_latents=True, cache_text_encoder_outputs=True)
    for name in ("random_crop", "color_aug", "shuffle_caption", "token_warmup_step"):
        assert f": {name} " in found


def test_fixed_forms_of_a_caption_let_shuffled_ones_be_cached(make_folder, build):
    text = one_subset(make_folder(), subset="shuffle_caption = true\ncaption_tag_dropout_rate = 0.1\nenable_wildcard = true")
    assert build(text, cache_text_encoder_outputs=True, text_cache_variants=4)
