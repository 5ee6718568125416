"""The dataset file: which value wins, and what a mistake is told."""

import json
import os
import re

import pytest
from dataset_samples import one_subset

from library.core.options import OptionError, declared
from library.data.config import read_datasets
from library.data.options import (
    DataOptions,
    DatasetOptions,
    SubsetOptions,
    dataset_keys,
    key_table,
    levels,
)


def read(tmp_path, text: str, name: str = "data.toml", **options):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_datasets(DataOptions(dataset_config=path, **options), default_resolution=1024)


def problems(tmp_path, text: str, name: str = "data.toml", **options) -> list[str]:
    with pytest.raises(OptionError) as caught:
        read(tmp_path, text, name, **options)
    return [problem.replace(f"{tmp_path}{os.sep}", "") for problem in caught.value.problems]


def test_the_nearest_level_wins(tmp_path):
    text = """
[general]
keep_tokens = 2
flip_aug = true
[[datasets]]
keep_tokens = 3
batch_size = 4
  [[datasets.subsets]]
  image_dir = "a"
  keep_tokens = 4
  [[datasets.subsets]]
  image_dir = "b"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "c"
  flip_aug = false
"""
    first, second = read(tmp_path, text, keep_tokens=1, caption_prefix="p", train_batch_size=8, resolution=(768, 512))
    a, b, c = (*first.subsets, *second.subsets)
    assert [subset.keep_tokens for subset in (a, b, c)] == [4, 3, 2]
    assert [subset.flip_aug for subset in (a, b, c)] == [True, True, False]
    assert {subset.caption_prefix for subset in (a, b, c)} == {"p"}
    assert (first.options.batch_size, second.options.batch_size) == (4, 8)
    assert first.options.size == (768, 512)


def test_the_model_gives_the_resolution_that_nobody_named(tmp_path):
    (dataset,) = read(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'")
    assert dataset.options.size == (1024, 1024)


def test_json_says_the_same(tmp_path):
    table = {"general": {"resolution": [64, 32]}, "datasets": [{"subsets": [{"image_dir": "a", "num_repeats": 3, "class_tokens": None}]}]}
    (dataset,) = read(tmp_path, json.dumps(table), "data.json")
    assert (dataset.options.size, dataset.subsets[0].num_repeats) == ((64, 32), 3)


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path):
    text = """[general]
flip_augg = true
[[datasets]]
resolution = "big"
batch_size = 0
[[datasets.subsets]]
num_repeats = -1
image_dir = "a"
[[datasets.subsets]]
image_dir = "b"
keep_tokens = "many"
"""
    found = problems(tmp_path, text)
    places = [problem.split(":")[0] for problem in found]
    assert places == [
        "data.toml line 2 ([general])",
        "data.toml line 4 ([[datasets]] 1)",
        "data.toml line 5 ([[datasets]] 1)",
        "data.toml line 7 ([[datasets.subsets]] 1.1)",
        "data.toml line 11 ([[datasets.subsets]] 1.2)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nflip_augg = true",
            "data.toml line 4 ([[datasets.subsets]] 1.1): unknown key 'flip_augg'; "
            "did you mean 'flip_aug' (allowed in [general], [[datasets]], [[datasets.subsets]])?",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nresolution = 512",
            "data.toml line 4 ([[datasets.subsets]] 1.1): 'resolution' is not allowed here; it belongs in [general], [[datasets]]",
        ),
        (
            "[general]\nis_reg = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([general]): 'is_reg' is not allowed here; it belongs in [[datasets.subsets]]",
        ),
        (
            "[[datasets]]\nbatch_size = 2.5\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([[datasets]] 1): batch_size: 2.5 is not a whole number",
        ),
        (
            "[[datasets]]\nbatch_size = true\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([[datasets]] 1): batch_size: True is not a whole number",
        ),
        (
            "[[datasets]]\nbatch_size = 0\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([[datasets]] 1): batch_size = 0: must be at least 1",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ncaption_dropout_rate = 1.5",
            "data.toml line 4 ([[datasets.subsets]] 1.1): caption_dropout_rate = 1.5: must be at most 1",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ntrain_inpainting = true",
            "data.toml line 4 ([[datasets.subsets]] 1.1): 'train_inpainting' is for inpainting models, "
            "which are not trained here; remove it",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nconditioning_data_dir = 'c'",
            "data.toml line 4 ([[datasets.subsets]] 1.1): conditioning_data_dir: ControlNets are not trained here; "
            "for loss masks add --masked_loss",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'a.json'\ncaption_extension = '.txt'",
            "data.toml line 4 ([[datasets.subsets]] 1.1): caption_extension: has no effect, captions come from metadata_file; remove it",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nis_reg = true\nis_validation = true",
            "data.toml line 5 ([[datasets.subsets]] 1.1): is_validation: is_reg is set too; regularisation images are for training, "
            "keep one of the two",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nvalidation_split = 0.5\nis_reg = true",
            "data.toml line 4 ([[datasets.subsets]] 1.1): validation_split: has no effect, "
            "regularisation images are never held out; remove it",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nface_crop_aug_range = [2.0, 1.0]",
            "data.toml line 4 ([[datasets.subsets]] 1.1): face_crop_aug_range = [2.0, 1.0]: must be two numbers above 0, the smaller first",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nresize_interpolation = 'lanczoz'",
            "data.toml line 4 ([[datasets.subsets]] 1.1): resize_interpolation: unknown choice 'lanczoz'; did you mean 'lanczos'?",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = ''",
            "data.toml line 3 ([[datasets.subsets]] 1.1): image_dir = '': must name a file or folder",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ncustom_attributes = 'x'",
            "data.toml line 4 ([[datasets.subsets]] 1.1): custom_attributes: 'x' is a text, but a table is needed; write it without quotes",
        ),
        (
            "[[datasets]]\nresolution = [1, 2, 3]",
            "data.toml line 2 ([[datasets]] 1): resolution: [1, 2, 3] is none of: 2 whole numbers or whole number",
        ),
        (
            "[[datasets]]\n[[datasets.subset]]\na = 1",
            "data.toml line 2 ([[datasets]] 1): unknown key 'subset'; did you mean 'subsets', as in [[datasets.subsets]]?",
        ),
        (
            "[[datasets]]\n[datasets.subsets]\na = 1",
            "data.toml line 2: 'subsets' must be a list of tables; write [[datasets.subsets]], in two brackets",
        ),
        ("[[datasets]]\nsubsets = ['a']", "data.toml ([[datasets.subsets]] 1.1): must be a table of keys and values, not 'a'"),
        (
            "datasets = [{subsets = [{image_dir = 'a', flip_augg = true}]}]",
            "data.toml line 1 ([[datasets.subsets]] 1.1): unknown key 'flip_augg'; "
            "did you mean 'flip_aug' (allowed in [general], [[datasets]], [[datasets.subsets]])?",
        ),
        (
            "\ufeff[[datasets]]\r\n[[datasets.subsets]]\r\nimage_dir = 'a'\r\nnum_repeats = -1",
            "data.toml line 4 ([[datasets.subsets]] 1.1): num_repeats = -1: must be at least 0",
        ),
        (
            "[[datasets]]\nvae_batch_size = 4\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([[datasets]] 1): 'vae_batch_size' belongs on the command line: --vae_batch_size",
        ),
        (
            "[general]\nmax_token_length = 225\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([general]): 'max_token_length' belongs on the command line: --max_token_length",
        ),
        (
            "[[datasets]]\ntrain_batch_size = 2\n[[datasets.subsets]]\nimage_dir = 'a'",
            "data.toml line 2 ([[datasets]] 1): unknown key 'train_batch_size'; "
            "did you mean 'batch_size' (allowed in [general], [[datasets]])?",
        ),
        ("[[dataset]]\nx = 1", "data.toml line 1: unknown table 'dataset'; did you mean 'datasets'?"),
        ("resolution = 5", "data.toml line 1: 'resolution' stands outside of every table; it is allowed in [general], [[datasets]]"),
        ("[datasets]\nbatch_size = 1", "data.toml line 1: 'datasets' must be a list of tables; write [[datasets]], in two brackets"),
        ("[general]", "data.toml: has no [[datasets]]; add one, with a [[datasets.subsets]] that names an image_dir"),
        ("[[datasets]]", "data.toml line 1 ([[datasets]] 1): has no [[datasets.subsets]]; add one that names an image_dir"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n[datasets.subsets.custom_attribute]\nx = 1",
            "data.toml line 4 ([[datasets.subsets]] 1.1): unknown key 'custom_attribute'; "
            "did you mean 'custom_attributes' (allowed in [general], [[datasets]], [[datasets.subsets]])?",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ncustom_attributes = {diff_output_preservation = 'yes'}",
            "data.toml line 4 ([[datasets.subsets]] 1.1): custom_attributes: diff_output_preservation must be true or false, not 'yes'",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2",
            "data.toml line 2 ([[datasets.subsets]] 1.1): names no images; add image_dir = FOLDER, or metadata_file = FILE",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    assert problems(tmp_path, text)[0] == message


def test_json_mistakes_have_their_lines(tmp_path):
    text = '{\n "datasets": [\n  {"subsets": [{"image_dir": "a",\n    "flip_augg": true}]},\n {"subsets": [{}, {"flip_augg": "\\"{"}\n]}]}'
    assert [problem.split(":")[0] for problem in problems(tmp_path, text, "data.json")] == [
        "data.json line 4 ([[datasets.subsets]] 1.1)",
        "data.json line 5 ([[datasets.subsets]] 2.2)",
        "data.json line 5 ([[datasets.subsets]] 2.1)",
        "data.json line 5 ([[datasets.subsets]] 2.2)",
    ]


def test_a_json_key_that_is_there_twice_is_named(tmp_path):
    with pytest.raises(OptionError, match="the key 'datasets' is there twice in one object"):
        read(tmp_path, '{"datasets": [], "datasets": [{"subsets": [{"image_dir": "a"}]}]}', "data.json")


def test_broken_toml_is_named_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset_config .*data\.toml: .*line 2"):
        read(tmp_path, "[general]\nflip_aug = yes")


def test_a_missing_file_is_named(tmp_path):
    for name in ("none.toml", "none.json"):
        with pytest.raises(ValueError, match=rf"--dataset_config .*{name}: no such file"):
            read_datasets(DataOptions(dataset_config=tmp_path / name), 1024)


def test_a_folder_in_place_of_the_file_is_named_as_such(tmp_path):
    with pytest.raises(ValueError, match=f"--dataset_config {re.escape(str(tmp_path))}: is a folder, and a file is needed"):
        read_datasets(DataOptions(dataset_config=tmp_path), 1024)


@pytest.mark.parametrize(("name", "text"), [("data.json", "[" * 100_000), ("data.toml", "a = " + "[" * 100_000)])
def test_a_file_nested_beyond_reading_is_named(tmp_path, name, text):
    with pytest.raises(ValueError, match=f"--dataset_config .*{name}: "):
        read(tmp_path, text, name)


def test_keys_of_sd_scripts_at_rest_are_taken(tmp_path):
    text = "[general]\ncolor_aug = false\ntoken_warmup_min = 1\ntoken_warmup_step = 0\nvalidation_split = 0.0\n"
    assert read(tmp_path, text + one_subset(tmp_path))


def test_a_folder_named_twice_in_a_dataset_is_used_once(tmp_path):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n[[datasets.subsets]]\nimage_dir = 'b/../a'\nnum_repeats = 5"
    (dataset,) = read(tmp_path, text)
    assert [subset.num_repeats for subset in dataset.subsets] == [1]


GENERAL_AND_DATASETS = """
    resolution batch_size enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale skip_image_resolution
    network_multiplier
""".split()
EVERYWHERE = """
    resize_interpolation num_repeats shuffle_caption caption_separator keep_tokens keep_tokens_separator secondary_separator
    enable_wildcard caption_prefix caption_suffix token_warmup_min token_warmup_step caption_dropout_rate
    caption_dropout_every_n_epochs caption_tag_dropout_rate color_aug flip_aug random_crop face_crop_aug_range custom_attributes
    caption_extension class_tokens cache_info validation_split validation_seed
""".split()  # validation keys stand in subsets too, which sd-scripts' older documents promise
IN_SUBSETS = "image_dir is_reg alpha_mask metadata_file conditioning_data_dir".split()
OUR_OWN = ["is_validation"]


def test_a_subset_that_is_repeated_no_time_is_left_out(tmp_path):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeats = 0\n"
    (dataset,) = read(tmp_path, text + "[[datasets.subsets]]\nimage_dir = 'b'")
    assert [subset.name for subset in dataset.subsets] == ["b"]
    assert problems(tmp_path, text) == [
        "data.toml line 1 ([[datasets]] 1): num_repeats = 0 leaves all of its subsets out; remove the dataset"
    ]


def test_every_key_of_sd_scripts_is_there_and_stands_where_it_may_stand():
    places = dict.fromkeys(GENERAL_AND_DATASETS, ("general", "datasets"))
    places |= dict.fromkeys(EVERYWHERE, ("general", "datasets", "subsets"))
    places |= dict.fromkeys([*IN_SUBSETS, *OUR_OWN], ("subsets",))
    assert {key: levels(key) for key in dataset_keys()} == places
    assert len(places) - len(OUR_OWN) == 39


COMMAND_LINE_CANNOT_SAY = {
    "image_dir",
    "class_tokens",
    "is_reg",
    "is_validation",
    "metadata_file",
    "network_multiplier",
    "custom_attributes",
}


def test_command_line_and_dataset_file_have_the_same_defaults():
    line = DataOptions()
    for entry in (*declared(DatasetOptions), *declared(SubsetOptions)):
        if entry.name not in COMMAND_LINE_CANNOT_SAY:
            assert line.value_for(entry.name) == entry.default, entry.name


def test_the_command_line_refuses_the_same_values():
    found = list(DataOptions(train_batch_size=0, caption_dropout_rate=2.0, caption_separator="").check())
    assert found == [
        "--train_batch_size 0: must be at least 1",
        "--caption_separator : must not be empty",
        "--caption_dropout_rate 2.0: must be at most 1",
    ]


def test_the_documented_key_table_is_the_declared_one(request):
    assert key_table() in (request.config.rootpath / "docs" / "dataset.md").read_text(encoding="utf-8")
