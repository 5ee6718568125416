"""What a trained file says of its data: the `ss_*` entries of sd-scripts about datasets, tags, folders and buckets."""

import json
import os
from collections import Counter
from collections.abc import Container
from itertools import chain, count
from pathlib import Path
from typing import Any

from library.data.dataset import TrainingData
from library.data.entries import ImageEntry
from library.data.images.buckets import Placement
from library.data.options import SubsetOptions

RUN_ENTRIES = (
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "face_crop_aug_range", "resize_interpolation",
    "validation_seed", "validation_split",
)  # fmt: skip
FOLDER_ENTRIES = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")
BUCKET_ENTRIES = ("enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "skip_image_resolution")
SUBSET_ENTRIES = (
    "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator",
    "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation", "face_crop_aug_range", "token_warmup_min",
    "token_warmup_step", "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "alpha_mask",
    "custom_attributes", "is_validation", "validation_split", "validation_seed",
)  # fmt: skip


def dataset_metadata(data: TrainingData) -> dict[str, str]:
    """The entries about the data, all texts. With a dataset file `ss_datasets` holds them; without, each has its own entry."""
    entries: dict[str, Any] = {f"ss_{name}": _of_run(data, name) for name in RUN_ENTRIES}
    entries["ss_prior_loss_weight"] = data.options.prior_loss_weight
    entries["ss_cache_latents"] = data.options.caches_latents
    entries["ss_num_train_images"] = data.num_train_images
    entries["ss_num_validation_images"] = len(data.validation.images) if data.validation is not None else 0
    entries["ss_num_reg_images"] = data.num_reg_images
    folders = {"ss_tag_frequency": tag_frequency(data.images), "ss_dataset_dirs": folder_counts(data, (False,))}
    if data.options.dataset_config is not None:
        described = [describe_dataset(data, index) for index in range(len(data.datasets))]
        folders = {"ss_datasets": described, "ss_tag_frequency": folders["ss_tag_frequency"], "ss_dataset_dirs": folder_counts(data)}
    else:
        entries |= _single_entries(data)
        folders |= {"ss_reg_dataset_dirs": folder_counts(data, (True,)), "ss_bucket_info": bucket_info(data, 0)}
    texts = {name: str(value) for name, value in entries.items()}
    return texts | {name: json.dumps(value) for name, value in folders.items()}


def describe_dataset(data: TrainingData, index: int) -> dict[str, Any]:
    """One dataset of `ss_datasets`."""
    options = data.datasets[index].options
    images = [image for image in data.images if image.dataset == index]
    return {
        "is_dreambooth": not any(subset.metadata_file for subset in data.datasets[index].subsets),
        "batch_size_per_device": options.batch_size,
        "num_train_images": sum(image.repeats for image in images if not image.options.is_reg),
        "num_reg_images": sum(image.repeats for image in images if image.options.is_reg),
        "resolution": options.size,
        "network_multiplier": options.network_multiplier,
        **{name: getattr(options, name) for name in BUCKET_ENTRIES},
        "tag_frequency": tag_frequency(images),
        "bucket_info": bucket_info(data, index),
        "subsets": [
            _describe_subset(subset, sum(image.subset == number for image in images))
            for number, subset in enumerate(data.datasets[index].subsets)
        ],
    }


def tag_frequency(images: list[ImageEntry]) -> dict[str, dict[str, int]]:
    """Folder name -> tag -> how many captions have it. Captions are split at commas; tags are lower-cased.

    The caption of an image that several datasets have counts once.
    """
    folders: dict[str, Counter[str]] = {}
    places = {folder: os.path.realpath(folder) for folder in {image.folder for image in images}}
    counted: set[tuple[str, str, str]] = set()
    for image in images:
        key = places[image.folder], image.name, image.caption
        if key not in counted:
            counted.add(key)
            tags = folders.setdefault(image.folder.name, Counter())
            tags.update(tag for part in image.caption.replace("\n", ",").split(",") if (tag := part.strip().lower()))
    return {name: dict(tags) for name, tags in folders.items()}


def bucket_info(data: TrainingData, index: int) -> dict[str, Any]:
    """The buckets of one dataset with their uses in an epoch, and the mean error of the aspect ratio by image."""
    buckets = {number: {"resolution": size, "count": count} for number, (size, count) in enumerate(data.bucket_counts(index).items())}
    errors = [_ratio_error(image.placement, image.size) for image in data.images if image.dataset == index]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def folder_counts(data: TrainingData, is_reg: Container[bool] = (False, True)) -> dict[str, dict[str, int]]:
    """Folder name -> repeats and images, of the training or regularisation folders; a second folder of a name becomes `name (2)`."""
    images = Counter((image.dataset, image.subset) for image in data.images)
    counts: dict[str, dict[str, int]] = {}
    for index, dataset in enumerate(data.datasets):
        for number, subset in enumerate(dataset.subsets):
            if subset.is_reg in is_reg and not subset.is_validation:
                counts[_free_name(_short_name(subset), counts)] = {"n_repeats": subset.num_repeats, "img_count": images[index, number]}
    return counts


# Parts


def _describe_subset(subset: SubsetOptions, images: int) -> dict[str, Any]:
    """A subset of `ss_datasets`; file names without their folders, which are nobody's business."""
    about: dict[str, Any] = {"img_count": images, "num_repeats": subset.num_repeats}
    about |= {name: getattr(subset, name) for name in SUBSET_ENTRIES}
    if subset.image_dir is not None:
        about["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return about | {"metadata_file": subset.metadata_file.name}
    return about | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _of_run(data: TrainingData, name: str) -> Any:
    """What all training subsets say, or the command line where they differ; `ss_datasets` has each of them."""
    values = {getattr(subset, name) for dataset in data.datasets for subset in dataset.subsets if not subset.is_validation}
    return values.pop() if len(values) == 1 else getattr(data.options, name)


def _short_name(subset: SubsetOptions) -> str:
    return (subset.image_dir or subset.metadata_file or Path()).name


def _free_name(name: str, taken: Container[str]) -> str:
    numbered = (f"{name} ({number})" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)


def _single_entries(data: TrainingData) -> dict[str, Any]:
    """What a run without a dataset file says in entries of their own."""
    options = data.datasets[0].options
    entries = {f"ss_{name}": getattr(data.options, name) for name in FOLDER_ENTRIES}
    entries |= {f"ss_{name}": getattr(options, name) for name in BUCKET_ENTRIES}
    return entries | {"ss_resolution": options.size, "ss_batch_size_per_device": options.batch_size}


def _ratio_error(placement: Placement, size: tuple[int, int]) -> float:
    return abs(placement.bucket[0] / placement.bucket[1] - size[0] / size[1])
