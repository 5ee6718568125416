"""Keys that have no effect beside the others are said, with the place that gave them."""

import pytest
from dataset_samples import one_subset


@pytest.mark.parametrize(
    ("dataset", "subset", "sentence"),
    [
        ("min_bucket_reso = 128", "", "data.toml line 3 ([[datasets]] 1): min_bucket_reso has no effect: enable_bucket is not on"),
        ("bucket_no_upscale = true", "", "bucket_no_upscale has no effect: enable_bucket is not on"),
        (
            "enable_bucket = true\nbucket_no_upscale = true\nmax_bucket_reso = 2048",
            "",
            "max_bucket_reso has no effect: with bucket_no_upscale buckets follow the sizes of the images",
        ),
        ("", "keep_tokens = 1", "keep_tokens has no effect: nothing shuffles, drops or warms up the parts of captions"),
        ("", "token_warmup_min = 3", "token_warmup_min has no effect: token_warmup_step is not given"),
        ("", "validation_seed = 3", "validation_seed has no effect: validation_split is not given"),
        ("", "face_crop_aug_range = [1.0, 2.0]", "face_crop_aug_range has no effect on 4 of 4 images"),
    ],
)
def test_a_key_in_vain_is_said(make_folder, build, logs, dataset, subset, sentence):
    build(one_subset(make_folder(), dataset, subset))
    assert sentence in logs.text


def test_a_weight_of_regularisation_images_that_are_not_there_is_said(make_folder, build, logs):
    build(one_subset(make_folder()), prior_loss_weight=0.5)
    assert "--prior_loss_weight has no effect: there are no regularisation images" in logs.text


def test_keys_that_act_are_not_said(make_folder, build, logs):
    build(one_subset(make_folder(), "enable_bucket = true\nmin_bucket_reso = 32", "keep_tokens = 1\nshuffle_caption = true"))
    assert "no effect" not in logs.text
