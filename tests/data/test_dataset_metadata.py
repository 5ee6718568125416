"""The data's entries in the trained file."""

import json

from dataset_samples import one_subset

from library.data.metadata import dataset_metadata


def test_a_dataset_file_is_described_as_sd_scripts_does(make_folder, build):
    text = one_subset(make_folder(sizes=[(64, 64), (64, 96)], caption="Red, square"), "batch_size = 2", "num_repeats = 3\nkeep_tokens = 1")
    entries = dataset_metadata(build(text, caption_dropout_rate=0.1, cache_latents_to_disk=True))
    assert all(isinstance(value, str) for value in entries.values())
    assert entries["ss_num_train_images"] == "6"
    assert entries["ss_num_reg_images"] == "0"
    assert entries["ss_cache_latents"] == "True"
    assert entries["ss_caption_dropout_rate"] == "0.1"
    assert json.loads(entries["ss_tag_frequency"]) == {"pictures": {"red": 2, "square": 2}}
    assert json.loads(entries["ss_dataset_dirs"]) == {"pictures": {"n_repeats": 3, "img_count": 2}}
    (dataset,) = json.loads(entries["ss_datasets"])
    assert dataset["resolution"] == [64, 64]
    assert dataset["bucket_info"]["buckets"] == {"0": {"resolution": [64, 64], "count": 6}}
    assert dataset["subsets"][0]["keep_tokens"] == 1


def test_without_a_dataset_file_each_fact_has_its_entry(make_folder, build, tmp_path):
    make_folder("train/2_sks dog", [(64, 64)])
    make_folder("reg/1_dog", [(64, 64)])
    entries = dataset_metadata(build(train_data_dir=tmp_path / "train", reg_data_dir=tmp_path / "reg", resolution=64, flip_aug=True))
    assert "ss_datasets" not in entries
    assert entries["ss_resolution"] == "(64, 64)"
    assert entries["ss_flip_aug"] == "True"
    assert entries["ss_num_reg_images"] == "2"
    assert json.loads(entries["ss_dataset_dirs"]) == {"2_sks dog": {"n_repeats": 2, "img_count": 1}}
    assert json.loads(entries["ss_reg_dataset_dirs"]) == {"1_dog": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(entries["ss_bucket_info"])["buckets"]["0"]["count"] == 4


def test_each_subset_has_its_entry_and_each_caption_counts_once(make_folder, build):
    first, second = make_folder("a/cat", [(64, 64)] * 3, "Red"), make_folder("b/cat", [(64, 64)], "blue")
    entries = dataset_metadata(build(one_subset(first) + one_subset(first.parent / ".." / "a" / "cat") + one_subset(second)))
    assert json.loads(entries["ss_dataset_dirs"]) == {
        name: {"n_repeats": 1, "img_count": images} for name, images in (("cat", 3), ("cat (2)", 3), ("cat (3)", 1))
    }
    assert json.loads(entries["ss_tag_frequency"]) == {"cat": {"red": 3, "blue": 1}}


def test_what_the_dataset_file_says_of_captions_and_validation_is_told(make_folder, build):
    text = one_subset(make_folder(), subset="caption_dropout_rate = 0.25\nvalidation_split = 0.5")
    entries = dataset_metadata(build(text))
    assert (entries["ss_caption_dropout_rate"], entries["ss_validation_split"]) == ("0.25", "0.5")
    entries = dataset_metadata(build(text + one_subset(make_folder("more")), caption_dropout_rate=0.1))
    assert entries["ss_caption_dropout_rate"] == "0.1"
    assert [dataset["subsets"][0]["caption_dropout_rate"] for dataset in json.loads(entries["ss_datasets"])] == [0.25, 0.1]
