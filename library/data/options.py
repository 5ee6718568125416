"""The options of the data: the command line's, a dataset's and a subset's, each declared once and shared by inheritance.

A key may stand at the levels that `levels` names; which value wins is settled in `library.data.config`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.options import Declared, declared, describe, option

Size = tuple[int, int]
"""Width and height in pixels."""

LEVELS = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}
ONLY_IN_SUBSETS = frozenset({"image_dir", "is_reg"})
COMMAND_LINE_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # the others have one name

NOT_YET: dict[str, Any] = {
    "skip_image_resolution": None, "resize_interpolation": None, "network_multiplier": 1.0, "validation_split": 0.0,
    "validation_seed": None, "token_warmup_min": 1, "token_warmup_step": 0, "color_aug": False, "face_crop_aug_range": None,
    "custom_attributes": {}, "cache_info": False, "alpha_mask": False, "metadata_file": None, "conditioning_data_dir": None,
}  # fmt: skip
"""Keys of sd-scripts without an answer here, and the value at which they ask for nothing: at that value they are taken."""

ONLY_ON_COMMAND_LINE = frozenset({"debug_dataset", "max_token_length", "prior_loss_weight", "train_inpainting"})

LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 65536), "num_repeats": (1, 1_000_000), "keep_tokens": (0, 10_000), "caption_dropout_rate": (0, 1),
    "caption_dropout_every_n_epochs": (0, 1_000_000), "caption_tag_dropout_rate": (0, 1), "min_bucket_reso": (1, 65536),
    "max_bucket_reso": (1, 65536), "bucket_reso_steps": (1, 65536), "vae_batch_size": (1, 65536),
    "text_encoder_batch_size": (1, 65536), "max_data_loader_n_workers": (0, 1024), "prior_loss_weight": (0, 1_000_000),
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
    caption_dropout_rate: float = option(0.0, help="chance of an empty caption, 0 to 1")
    caption_dropout_every_n_epochs: int = option(0, help="every n-th epoch has empty captions; 0 for none")
    caption_tag_dropout_rate: float = option(0.0, help="chance of each free part of a caption to be left out, 0 to 1")
    flip_aug: bool = option(False, help="mirror half of the images, drawn anew at every use")
    random_crop: bool = option(False, help="crop at a random place instead of the centre; not with cached latents")


@dataclass(kw_only=True, frozen=True)
class DatasetOptions(SharedDatasetOptions):
    """Keys of a dataset: one resolution and one batch size."""

    batch_size: int = option(1, help="images a step and device, all from one bucket")

    @property
    def size(self) -> Size:
        """The resolution as (width, height); it has been settled."""
        assert self.resolution is not None
        return as_size(self.resolution)


@dataclass(kw_only=True, frozen=True)
class SubsetOptions(SharedSubsetOptions):
    """Keys of a subset: one folder of images."""

    image_dir: Path = option(help="folder with the images and caption files (not its subfolders)")
    num_repeats: int = option(1, help="how often an epoch shows each image")
    class_tokens: str | None = option(None, help="caption of images without a caption file")
    is_reg: bool = option(False, help="regularisation images: balanced against the others, loss times prior_loss_weight")

    @property
    def caption_extensions(self) -> tuple[str, ...]:
        """The endings to look for, in order."""
        ending = self.caption_extension if self.caption_extension.startswith(".") else f".{self.caption_extension}"
        return (ending, ".txt") if ending == ".caption" else (ending,)

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
    train_batch_size: int = option(1, help="batch size where the dataset file names none")
    dataset_repeats: int = option(1, help="num_repeats where the dataset file names none")
    prior_loss_weight: float = option(1.0, help="loss factor of regularisation images")
    cache_latents: bool = option(False, help="encode the images once, before training")
    cache_latents_to_disk: bool = option(False, help="the same, kept in .hadron_cache beside the images for later runs")
    cache_text_encoder_outputs: bool = option(False, help="encode the captions once, before training")
    cache_text_encoder_outputs_to_disk: bool = option(False, help="the same, kept in .hadron_cache beside the images for later runs")
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
    if key == "resolution" and value is not None and min(as_size(value)) < 1:
        return "must be positive"
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
