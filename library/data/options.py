"""The options of the data: the command line's, a dataset's and a subset's, each declared once and shared by inheritance.

A key may stand at the levels that `levels` names; which value wins is settled in `library.data.config`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.core.options import Declared, declared, describe, option

Size = tuple[int, int]
"""Width and height in pixels."""

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]

LEVELS = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}
ONLY_IN_SUBSETS = frozenset({"image_dir", "is_reg", "is_validation", "metadata_file", "conditioning_data_dir", "alpha_mask"})
COMMAND_LINE_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # the others have one name
ELSEWHERE = {
    "train_inpainting": "is for inpainting models, which are not trained here; remove it",
    "debug_dataset": "belongs on the command line: --debug_dataset",
    "max_token_length": "belongs on the command line: --max_token_length",
}
"""Keys of sd-scripts' dataset code that no dataset file may hold, and why; those of `DataOptions` are known besides."""

LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 65536), "num_repeats": (0, 1_000_000), "keep_tokens": (0, 10_000), "caption_dropout_rate": (0, 1),
    "caption_dropout_every_n_epochs": (0, 1_000_000), "caption_tag_dropout_rate": (0, 1), "min_bucket_reso": (1, 65536),
    "max_bucket_reso": (1, 65536), "bucket_reso_steps": (1, 65536), "vae_batch_size": (1, 65536),
    "text_encoder_batch_size": (1, 65536), "max_data_loader_n_workers": (0, 1024), "prior_loss_weight": (0, 1_000_000),
    "token_warmup_min": (0, 10_000), "token_warmup_step": (0, 1_000_000_000), "validation_split": (0, 1), "validation_seed": (0, 2**63 - 1),
    "text_cache_variants": (1, 1000), "network_multiplier": (-1000, 1000),
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class SharedDatasetOptions:
    """What the command line and a dataset may both say."""

    resolution: Size | int | None = option(None, help="target size: one number for a square, or width,height; with buckets its area counts")
    enable_bucket: bool = option(False, help="group images by aspect ratio instead of cropping all to one size")
    min_bucket_reso: int = option(256, help="shortest side of a bucket; rounded down to the step; ignored with bucket_no_upscale")
    max_bucket_reso: int = option(1024, help="longest side of a bucket; rounded up to the step; ignored with bucket_no_upscale")
    bucket_reso_steps: int = option(64, help="bucket sides are multiples of this")
    bucket_no_upscale: bool = option(False, help="never enlarge an image; buckets follow the sizes of the images")
    skip_image_resolution: Size | int | None = option(None, help="leave out images with at most this many pixels (side, or width,height)")


@dataclass(kw_only=True, frozen=True)
class SharedSubsetOptions:
    """What the command line and a subset may both say."""

    caption_extension: str = option(
        ".caption",
        flags=("--caption_extension", "--caption_extention"),
        help="ending of caption files; at .caption, .txt is looked for as well",
    )
    shuffle_caption: bool = option(False, help="shuffle the parts of a caption at every use")
    caption_separator: str = option(",", help="what divides a caption into parts")
    keep_tokens: int = option(0, help="how many leading parts are neither shuffled nor dropped")
    keep_tokens_separator: str | None = option(None, help="mark in a caption: parts before the first and after a second one stay in place")
    secondary_separator: str | None = option(None, help="divides within a part; becomes caption_separator after shuffling and dropping")
    enable_wildcard: bool = option(False, help="{a|b|c} draws one of its choices; of several lines one is drawn")
    caption_prefix: str | None = option(None, help="text put before every caption, with a space")
    caption_suffix: str | None = option(None, help="text put after every caption, with a space")
    token_warmup_min: int = option(1, help="free parts of a caption kept at the first step of token_warmup_step")
    token_warmup_step: float = option(0.0, help="steps until all free parts are kept; below 1 a share of the run, 0 for none")
    caption_dropout_rate: float = option(0.0, help="chance of an empty caption, 0 to 1")
    caption_dropout_every_n_epochs: int = option(0, help="every n-th epoch has empty captions; 0 for none")
    caption_tag_dropout_rate: float = option(0.0, help="chance of each free part of a caption to be left out, 0 to 1")
    flip_aug: bool = option(False, help="mirror half of the images, drawn anew at every use")
    random_crop: bool = option(False, help="crop at a random place instead of the centre; not with cached latents")
    color_aug: bool = option(False, help="now and then change hue or gamma a little; not with cached latents")
    face_crop_aug_range: tuple[float, float] | None = option(
        None, help="zoom on the face whose place the file name ends with (_x_y_width_height): least,most; not with cached latents"
    )
    resize_interpolation: Interpolation | None = option(None, help="how images are resized; by default area to shrink, else lanczos")
    alpha_mask: bool = option(False, help="the images' transparency says how much each place counts in the loss")
    conditioning_data_dir: Path | None = option(None, help="folder of mask images named as the images, for --masked_loss")
    validation_split: float = option(0.0, help="share of the images held out for validation, 0 to 1")
    validation_seed: int | None = option(None, help="draws the images held out (default: the run's seed)")
    cache_info: bool = option(False, help="keep sizes and hashes of the images in .hadron_cache, which also caches on disk do")


@dataclass(kw_only=True, frozen=True)
class DatasetOptions(SharedDatasetOptions):
    """Keys of a dataset: one resolution and one batch size."""

    batch_size: int = option(1, help="images a step and device, all from one bucket")
    network_multiplier: float = option(1.0, help="strength of the network for these images, negative to train away from them")

    @property
    def size(self) -> Size:
        """The resolution as (width, height); it has been settled."""
        assert self.resolution is not None
        return as_size(self.resolution)


@dataclass(kw_only=True, frozen=True)
class SubsetOptions(SharedSubsetOptions):
    """Keys of a subset: one folder of images."""

    image_dir: Path | None = option(
        None, help="folder with the images and caption files (not its subfolders); required without metadata_file"
    )
    metadata_file: Path | None = option(
        None, help="file (.json, .jsonl) that lists images with captions and tags, in place of caption files"
    )
    num_repeats: int = option(1, help="how often an epoch shows each image; 0 leaves the subset out")
    class_tokens: str | None = option(None, help="caption of images without a caption file")
    is_reg: bool = option(False, help="regularisation images: balanced against the others, loss times prior_loss_weight")
    is_validation: bool = option(False, help="images for validation only")
    custom_attributes: dict | None = option(
        None, help="table of marks for the trainer; diff_output_preservation = true is the one it knows"
    )

    @property
    def name(self) -> str:
        """The folder or metadata file, for messages."""
        return str(self.image_dir or self.metadata_file)

    @property
    def caption_extensions(self) -> tuple[str, ...]:
        """The endings to look for, in order."""
        ending = self.caption_extension if self.caption_extension.startswith(".") else f".{self.caption_extension}"
        return (ending, ".txt") if ending == ".caption" else (ending,)

    @property
    def caption_joint(self) -> str:
        """What stands between parts that are joined: the separator, and a space where it does not end with one."""
        return self.caption_separator if self.caption_separator[-1].isspace() else f"{self.caption_separator} "

    @property
    def drops_captions(self) -> bool:
        """May a caption be emptied as a whole?"""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


@dataclass(kw_only=True, frozen=True)
class DataOptions(SharedDatasetOptions, SharedSubsetOptions):
    """Images, captions and caches."""

    dataset_config: Path | None = option(None, help="dataset file (.toml or .json)")
    train_data_dir: Path | None = option(None, help="without a dataset file: folder of <repeats>_<class tokens> folders")
    reg_data_dir: Path | None = option(None, help="the same for regularisation images")
    validation_data_dir: Path | None = option(None, help="the same for images that are for validation only")
    in_json: Path | None = option(None, help="metadata file (.json, .jsonl) for the images of --train_data_dir, without a dataset file")
    train_batch_size: int = option(1, help="batch size where the dataset file names none")
    dataset_repeats: int = option(1, help="num_repeats where the dataset file names none")
    prior_loss_weight: float = option(1.0, help="loss factor of regularisation images")
    masked_loss: bool = option(False, help="weigh the loss by the mask images of conditioning_data_dir, or by alpha_mask")
    bad_images: Literal["error", "skip"] = option("error", help="images that cannot be read: stop and name all, or name and leave them out")
    cache_latents: bool = option(False, help="encode the images once, before training")
    cache_latents_to_disk: bool = option(False, help="the same, kept in .hadron_cache beside the images for later runs")
    cache_text_encoder_outputs: bool = option(False, help="encode the captions once, before training")
    cache_text_encoder_outputs_to_disk: bool = option(False, help="the same, kept in .hadron_cache beside the images for later runs")
    skip_cache_check: bool = option(False, help="take entries of the caches on disk as sound where the file exists")
    text_cache_variants: int = option(1, help="forms of each caption in the text cache, for shuffled captions and tag dropout; 1 for none")
    vae_batch_size: int = option(1, help="images encoded at once when latents are cached")
    text_encoder_batch_size: int | None = option(None, help="captions encoded at once when text is cached (default: the batch size)")
    max_data_loader_n_workers: int = option(8, help="processes that read images, at most one a processor; 0 reads in the main process")
    persistent_data_loader_workers: bool = option(False, help="keep those processes from one epoch to the next")

    def check(self) -> Iterator[str]:
        """Values that no dataset could use."""
        for entry in declared(DataOptions):
            problem = limit_problem(_dataset_name(entry.name), getattr(self, entry.name))
            if problem:
                yield f"{entry.flags[0]} {getattr(self, entry.name)}: {problem}"

    @property
    def caches_latents(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_text(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def value_for(self, key: str) -> Any:
        """What the command line says for a key of the dataset file. Raises `AttributeError` for keys that it cannot say."""
        return getattr(self, COMMAND_LINE_NAMES.get(key, key))


def dataset_keys() -> dict[str, Declared]:
    """Every key that a dataset file may hold, by name."""
    return {entry.name: entry for group in (DatasetOptions, SubsetOptions) for entry in declared(group)}


def levels(key: str) -> tuple[str, ...]:
    """The levels at which a key may stand: names of `LEVELS`, the widest first."""
    if key in ONLY_IN_SUBSETS:
        return ("subsets",)
    inherits = any(entry.name == key for entry in declared(SubsetOptions))
    return ("general", "datasets", "subsets") if inherits else ("general", "datasets")


def limit_problem(key: str, value: Any) -> str | None:
    """Why a value of the right type cannot be used, or None."""
    if key in LIMITS and value is not None:
        low, high = LIMITS[key]
        if not low <= value <= high:
            return f"must be at least {low}" if value < low else f"must be at most {high}"
    if key in ("caption_separator", "caption_extension") and value == "":
        return "must not be empty"
    if key in ("image_dir", "metadata_file", "conditioning_data_dir") and value == Path():
        return "must name a file or folder"
    if key in ("resolution", "skip_image_resolution") and value is not None and min(as_size(value)) < 1:
        return "must be positive"
    if key == "network_multiplier" and value == 0:
        return "must not be 0, at which nothing is trained; leave the dataset out"
    if key == "face_crop_aug_range" and value is not None and not 0 < value[0] <= value[1]:
        return "must be two numbers above 0, the smaller first"
    return None


def as_size(resolution: Size | int) -> Size:
    """A resolution as (width, height)."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def key_table() -> str:
    """The keys of a dataset file as a Markdown table, for docs/dataset.md."""
    rows = []
    for name, entry in dataset_keys().items():
        places = ", ".join(LEVELS[level] for level in levels(name))
        meaning = entry.help.replace("|", "\\|")
        rows.append(f"| `{name}` | {describe(entry.kind)} | {_default(entry)} | {places} | {meaning} |")
    return "\n".join(["| key | type | default | stands in | meaning |", "| --- | --- | --- | --- | --- |", *rows]) + "\n"


# Names and defaults


def _dataset_name(flag_name: str) -> str:
    return next((key for key, name in COMMAND_LINE_NAMES.items() if name == flag_name), flag_name)


def _default(entry: Declared) -> str:
    if entry.required:
        return "required"
    return "none" if entry.default is None else f"`{str(entry.default).lower()}`"
