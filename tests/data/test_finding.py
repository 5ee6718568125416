"""Which images a run trains on and which it validates on: hold-out, minimum sizes, masks, bad images."""

import json

import pytest
from dataset_samples import noise, one_subset
from PIL import Image

from library.core.options import OptionError


def names(images) -> list[str]:
    return [image.path.name for image in images]


def test_no_image_is_trained_on_and_validated_on(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64)] * 10), subset="validation_split = 0.3\nvalidation_seed = 1"))
    trained, validated = set(names(data.images)), set(names(data.validation.images))
    assert len(trained) == 7 and len(validated) == 3 and not trained & validated


def test_two_datasets_of_one_folder_hold_out_the_same_images(make_folder, build):
    folder = make_folder(sizes=[(64, 64), (96, 96)] * 5)
    low = one_subset(folder, subset="validation_split = 0.2\nvalidation_seed = 1")
    high = one_subset(folder, "skip_image_resolution = 64").replace("resolution = 64", "resolution = 96")
    data = build(low + high)
    held_out = set(names(data.validation.images))
    assert len(held_out) == 2 and not held_out & set(names(data.images))


def test_an_image_that_is_held_out_is_not_trained_on_through_a_link(make_folder, build, logs):
    folder = make_folder("a")
    links = make_folder("b", sizes=())
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    text = one_subset(folder, subset="validation_split = 0.5") + one_subset(links, subset="num_repeats = 3")
    data = build(text)
    held_out = {image.name for image in data.validation.images}
    assert len(held_out) == 2 and held_out.isdisjoint(image.name for image in data.images)
    assert "6 uses of images are left out of training" in logs.text


def test_validation_images_are_seen_once_and_always_alike(make_folder, build):
    drawn = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 1.0\nrandom_crop = true\nnum_repeats = 5"
    data = build(one_subset(make_folder(sizes=[(64, 96)] * 4), subset=f"{drawn}\nvalidation_split = 0.5"))
    assert [image.repeats for image in data.validation.images] == [1, 1]
    views = [data.validation.view(epoch, sample) for epoch in range(3) for plan in data.validation.order(0) for sample in plan.samples]
    assert len({(view.image.path, view.caption, view.crop) for view in views}) == 2
    assert all(view.caption and not view.crop.flipped for view in views)


def test_a_validation_folder_is_never_trained_on(make_folder, build):
    train, held_out = make_folder("train"), make_folder("held_out", [(64, 64)] * 2)
    data = build(one_subset(train) + f"[[datasets.subsets]]\nimage_dir = '{held_out}'\nis_validation = true\nnum_repeats = 3\n")
    assert {image.path.parent.name for image in data.images} == {"train"}
    assert {image.path.parent.name for image in data.validation.images} == {"held_out"}


def test_validation_folders_are_found_by_name_without_a_dataset_file(make_folder, build, tmp_path):
    make_folder("train/2_a")
    make_folder("held_out/1_b", [(64, 64)] * 2)
    data = build(train_data_dir=tmp_path / "train", validation_data_dir=tmp_path / "held_out")
    assert len(data.images) == 4 and len(data.validation.images) == 2


def test_all_images_held_out_leave_nothing_to_train_on(make_folder, build):
    with pytest.raises(OptionError, match="no image is left to train on"):
        build(one_subset(make_folder(), subset="validation_split = 1.0"))


def test_small_images_are_left_out_where_asked(make_folder, build, logs):
    data = build(one_subset(make_folder(sizes=[(64, 64), (65, 64), (32, 200)]), "skip_image_resolution = [64, 64]"))
    assert names(data.images) == ["001.png", "002.png"]
    assert "1 images of at most 64x64 pixels are left out (skip_image_resolution)" in logs.text


def test_images_of_a_metadata_file_are_split_too(make_folder, build, tmp_path):
    folder = make_folder(sizes=[(64, 64)] * 6, caption=None)
    (tmp_path / "list.json").write_text(json.dumps({f"{n:03d}": {"caption": f"number {n}"} for n in range(6)}))
    text = one_subset(folder, subset=f"metadata_file = '{tmp_path / 'list.json'}'\nvalidation_split = 0.5")
    data = build(text)
    assert len(data.images) == 3 and not set(names(data.images)) & set(names(data.validation.images))
    assert {image.caption for image in [*data.images, *data.validation.images]} == {f"number {n}" for n in range(6)}


def test_in_json_is_the_metadata_file_of_the_training_folder(make_folder, build, tmp_path):
    folder = make_folder(sizes=[(64, 64)], caption=None)
    (tmp_path / "list.json").write_text(json.dumps({"000": {"caption": "a", "tags": "b, c"}}))
    data = build(train_data_dir=folder, in_json=tmp_path / "list.json", dataset_repeats=4)
    assert [(image.caption, image.repeats) for image in data.images] == [("a, b, c", 4)]


def test_every_image_without_a_mask_is_named(make_folder, build):
    folder, masks = make_folder(), make_folder("masks", [(64, 64)] * 2, caption=None)
    with pytest.raises(OptionError) as caught:
        build(one_subset(folder, subset=f"conditioning_data_dir = '{masks}'"), masked_loss=True)
    assert [problem.split(":")[0].split("/")[-1] for problem in caught.value.problems] == ["002.png", "003.png"]


def test_two_masks_of_one_name_are_said(make_folder, build, logs):
    folder, masks = make_folder(), make_folder("masks", caption=None)
    (masks / "000.jpg").write_bytes((masks / "000.png").read_bytes())
    data = build(one_subset(folder, subset=f"conditioning_data_dir = '{masks.as_posix()}'"), masked_loss=True)
    assert data.images[0].mask == masks / "000.png"
    assert "1 masks are not used, as another has the same name: 000.jpg" in logs.text


def test_a_mask_of_another_shape_is_named_before_training(make_folder, build):
    folder, masks = make_folder(), make_folder("masks", [(64, 64), (32, 32), (64, 32), (64, 64)], caption=None)
    with pytest.raises(OptionError) as caught:
        build(one_subset(folder, subset=f"conditioning_data_dir = '{masks}'"), masked_loss=True)
    (problem,) = caught.value.problems
    assert "002.png: the mask is 64x32, and " in problem and problem.endswith("is 64x64; make it as large as the image")


@pytest.mark.parametrize("key", ["image_dir", "conditioning_data_dir"])
def test_a_file_in_place_of_a_folder_is_named_as_such(make_folder, build, key):
    folder = make_folder()
    file = folder / "000.png"
    text = one_subset(file if key == "image_dir" else folder, subset="" if key == "image_dir" else f"{key} = '{file}'")
    with pytest.raises(OptionError, match=f"000.png: is a file, and {key} names a folder"):
        build(text, masked_loss=key != "image_dir")


def test_masked_loss_without_a_mask_is_refused(make_folder, build):
    with pytest.raises(OptionError, match="--masked_loss: there are no masks"):
        build(one_subset(make_folder()), masked_loss=True)


def test_the_batch_carries_masks_at_the_size_of_latents(make_folder, build):
    folder, masks = make_folder(sizes=[(64, 64)] * 2), make_folder("masks", [], caption=None)
    for n, grey in enumerate((0, 255)):
        Image.new("L", (64, 64), grey).save(masks / f"{n:03d}.png")
    data = build(one_subset(folder, "batch_size = 2", f"conditioning_data_dir = '{masks}'"), masked_loss=True)
    batch = data.batch(0, 0)
    assert batch.mask.shape == (2, 1, 8, 8)
    assert {(image[-7:-4], mask.mean().item()) for image, mask in zip(batch.images, batch.mask, strict=True)} == {
        ("000", 0.0),
        ("001", 1.0),
    }


def test_an_image_without_alpha_beside_one_with_it_counts_everywhere(make_folder, build):
    folder = make_folder(sizes=[(64, 64)])
    Image.fromarray(noise((64, 64), 1, channels=4)).save(folder / "001.png")
    (folder / "001.txt").write_text("half there")
    batch = build(one_subset(folder, "batch_size = 2", "alpha_mask = true")).batch(0, 0)
    means = {image[-7:-4]: mask.mean().item() for image, mask in zip(batch.images, batch.mask, strict=True)}
    assert means["000"] == 1.0 and 0.4 < means["001"] < 0.6


def test_no_mask_is_carried_where_none_is_wanted(make_folder, build):
    assert build(one_subset(make_folder())).batch(0, 0).mask is None


@pytest.mark.parametrize("bad", [b"", b"no image", None])
def test_bad_images_are_all_named_or_left_out_as_asked(make_folder, build, logs, bad):
    folder = make_folder()
    for name in ("001.png", "003.png"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2] if bad is None else bad)
    with pytest.raises(OptionError) as caught:
        build(one_subset(folder))
    assert [name in str(caught.value) for name in ("000.png", "001.png", "002.png", "003.png")] == [False, True, False, True]
    assert names(build(one_subset(folder), bad_images="skip").images) == ["000.png", "002.png"]
    assert "2 images cannot be read and are left out" in logs.text


def test_the_marks_of_a_subset_and_the_strength_of_a_dataset_reach_the_batch(make_folder, build, logs):
    marked = "custom_attributes = {diff_output_preservation = true, colour = 'red'}"
    batch = build(one_subset(make_folder(), "network_multiplier = -1", marked)).batch(0, 0)
    assert batch.network_multiplier == -1.0 and batch.preserves.tolist() == [True]
    assert "the custom attribute 'colour' has no effect; the trainer knows diff_output_preservation" in logs.text


def test_cache_info_keeps_sizes_beside_the_images(make_folder, build):
    folder = make_folder()
    build(one_subset(folder))
    assert not (folder / ".hadron_cache").exists()
    build(one_subset(folder, subset="cache_info = true"))
    assert len(json.loads((folder / ".hadron_cache" / "files.json").read_text())["files"]) == 4
