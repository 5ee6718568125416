"""The data of a run: which batches an epoch has, and what each of them holds, for any number of workers and ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from library.core.keyed_random import keyed_random
from library.core.log import get_logger
from library.core.options import OptionError
from library.data.batch import Batch, Sizes, TextStates
from library.data.buckets import bucket_problems
from library.data.captions import drawn_caption, varying_options
from library.data.config import Dataset, read_datasets
from library.data.entries import ImageEntry, find_images
from library.data.images import load_pixels
from library.data.metadata import dataset_metadata
from library.data.options import DataOptions, Size
from library.data.order import BatchPlan, Sample, batch_count, epoch_order

logger = get_logger(__name__)


class LatentStore(Protocol):
    """Where cached latents come from."""

    @property
    def in_memory(self) -> bool:
        """Is nothing read from files?"""
        ...

    def latents(self, image: int, flipped: bool) -> Tensor:
        """Latents (channels, height / 8, width / 8) float32 of one image, or of its mirror image."""
        ...


class TextStore(Protocol):
    """Where cached text states come from."""

    def states(self, caption: str) -> dict[str, Tensor]:
        """The states of one caption, without the batch dimension."""
        ...


@dataclass(frozen=True)
class View:
    """What one sample shows: an image, its caption as drawn, and its crop in the image as resized (and then mirrored)."""

    image: ImageEntry
    caption: str
    flipped: bool
    corner: tuple[int, int]  # left and top of the crop, before mirroring

    @property
    def crop(self) -> tuple[int, int]:
        """Top and left of the crop really made, as the model is told: counted in the mirrored image where it is mirrored."""
        left, top = self.corner
        return top, self.image.placement.slack[0] - left if self.flipped else left


class TrainingData:
    """The images of a run and their order. All of it is a pure function of the files, the options and the seed."""

    def __init__(self, datasets: Sequence[Dataset], images: Sequence[ImageEntry], options: DataOptions, seed: int) -> None:
        self.datasets = list(datasets)
        self.images = list(images)
        self.options = options
        self.seed = seed
        self.latents: LatentStore | None = None  # set by `caches.fill_latents`
        self.text: TextStore | None = None  # set by `caches.fill_text`
        self._order: tuple[int, list[BatchPlan]] = (-1, [])

    @property
    def num_train_images(self) -> int:
        """Uses of training images in an epoch."""
        return sum(image.repeats for image in self.images if not image.options.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Uses of regularisation images in an epoch."""
        return sum(image.repeats for image in self.images if image.options.is_reg)

    @property
    def resolution(self) -> Size:
        """Width and height of the first dataset's resolution, for the metadata of the trained file."""
        return self.datasets[0].options.size

    @property
    def has_cached_text(self) -> bool:
        """Do batches carry text states?"""
        return self.text is not None

    @property
    def has_latents_in_memory(self) -> bool:
        """Are batches put together without reading files? Worker processes would then only cost."""
        return self.latents is not None and self.latents.in_memory

    def metadata(self) -> dict[str, str]:
        """The `ss_*` entries about the data (see `library.data.metadata`)."""
        return dataset_metadata(self)

    def bucket_counts(self, dataset: int) -> dict[Size, int]:
        """Uses in an epoch by bucket, ascending."""
        counts: Counter[Size] = Counter()
        for image in self.images:
            if image.dataset == dataset:
                counts[image.placement.bucket] += image.repeats
        return dict(sorted(counts.items()))

    def batches_per_epoch(self, world: int = 1) -> int:
        """Batches that each of `world` ranks gets in an epoch."""
        return -(-batch_count(self.images, self._batch_sizes()) // world)

    def order(self, epoch: int) -> list[BatchPlan]:
        """The batches of an epoch (counted from 0), over all ranks."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.images, self._batch_sizes(), seed=self.seed, epoch=epoch))
        return self._order[1]

    def view(self, epoch: int, sample: Sample) -> View:
        """What one sample of an epoch shows. Draws are keyed by epoch, image and repeat: batch size and rank change nothing."""
        image = self.images[sample.image]
        key = (epoch, sample.image, sample.repeat)
        caption = drawn_caption(image.caption, image.options, epoch=epoch, draw=keyed_random(self.seed, "caption", *key))
        flipped = image.options.flip_aug and keyed_random(self.seed, "flip", *key).random() < 0.5
        corner = image.placement.centre
        if image.options.random_crop:
            draw = keyed_random(self.seed, "crop", *key)
            corner = draw.randint(0, image.placement.slack[0]), draw.randint(0, image.placement.slack[1])
        return View(image, caption, flipped, corner)

    def batch(self, epoch: int, position: int) -> Batch:
        """The batch at a position of an epoch (over all ranks).

        Positions past the end, which complete the last step of several ranks, repeat batches from the start with loss weight 0.
        Raises `ValueError` naming an image that cannot be decoded.
        """
        plans = self.order(epoch)
        plan = plans[position % len(plans)]
        views = [self.view(epoch, sample) for sample in plan.samples]
        captions = [view.caption for view in views]
        weights = [self._loss_weight(view) if position < len(plans) else 0.0 for view in views]
        return Batch(
            images=[str(view.image.path) for view in views],
            captions=captions,
            sizes=_sizes(views),
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            pixels=_pixels(views) if self.latents is None else None,
            latents=self._latents(plan, views),
            text=self._text(captions),
            epoch=epoch,
            position=position,
        )

    def _batch_sizes(self) -> list[int]:
        return [dataset.options.batch_size for dataset in self.datasets]

    def _loss_weight(self, view: View) -> float:
        return self.options.prior_loss_weight if view.image.options.is_reg else 1.0

    def _latents(self, plan: BatchPlan, views: Sequence[View]) -> Tensor | None:
        if self.latents is None:
            return None
        store = self.latents
        return torch.stack([store.latents(sample.image, view.flipped) for sample, view in zip(plan.samples, views, strict=True)])

    def _text(self, captions: Sequence[str]) -> TextStates | None:
        if self.text is None:
            return None
        states = [self.text.states(caption) for caption in captions]
        return {name: torch.stack([each[name] for each in states]) for name in states[0]}


def build_training_data(options: DataOptions, *, seed: int, resolution_step: int, default_resolution: int) -> TrainingData:
    """Read the dataset file (or folders), find and measure the images, read the captions.

    `resolution_step` is what the model needs of image sides; `default_resolution` the side where nobody names a resolution.
    Raises `OptionError` with everything wrong with the dataset file, or else everything wrong with the images and captions.
    """
    datasets = read_datasets(options, default_resolution)
    problems = [problem for dataset in datasets for problem in bucket_problems(dataset.options, resolution_step, dataset.where)]
    problems += latent_cache_problems(datasets) if options.caches_latents else []
    problems += text_cache_problems(datasets) if options.caches_text else []
    if problems:
        raise OptionError(dict.fromkeys(problems))
    data = TrainingData(datasets, find_images(datasets), options, seed)
    _describe(data)
    return data


def latent_cache_problems(datasets: Sequence[Dataset]) -> list[str]:
    """The options that need pixels at each use, for cached latents."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets if subset.random_crop]
    return [f"{subset.image_dir}: random_crop reads the images anew at each use; remove it, or --cache_latents" for subset in subsets]


def text_cache_problems(datasets: Sequence[Dataset]) -> list[str]:
    """The options that change captions from use to use, for cached text. Dropout of the whole caption is none of them."""
    return [
        f"{subset.image_dir}: {name} changes captions from use to use; remove it, or --cache_text_encoder_outputs"
        for dataset in datasets
        for subset in dataset.subsets
        for name in varying_options(subset)
    ]


class BatchDataset(TorchDataset[Batch]):
    """The batches of one rank, from position `start` of `epoch` to the end of the last of `epochs`, for a `DataLoader` without batching.

    `start` counts over all ranks and must be a multiple of `world`. Every rank gets the same number of batches.
    """

    def __init__(self, data: TrainingData, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1, epochs: int = 1) -> None:
        assert 0 <= rank < world and start % world == 0 and epochs >= 1, "a rank outside of its world, or a start between ranks"
        self.data, self.epoch, self.rank, self.world = data, epoch, rank, world
        self.steps = data.batches_per_epoch(world)
        self.skipped = start // world
        self.length = max(0, self.steps * epochs - self.skipped)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.length:
            raise IndexError(index)
        epoch, step = divmod(index + self.skipped, self.steps)
        return self.data.batch(self.epoch + epoch, step * self.world + self.rank)


# The parts of a batch


def _pixels(views: Sequence[View]) -> Tensor:
    return torch.stack([load_pixels(view.image.path, view.image.placement, view.corner, view.flipped) for view in views])


def _sizes(views: Sequence[View]) -> Sizes:
    return Sizes(
        original=torch.tensor([view.image.size[::-1] for view in views]),
        crop=torch.tensor([view.crop for view in views]),
        target=torch.tensor([view.image.placement.bucket[::-1] for view in views]),
    )


# What the log says


def _describe(data: TrainingData) -> None:
    regular = f" and {data.num_reg_images} of regularisation" if data.num_reg_images else ""
    logger.info(
        "data: %d images, %d uses an epoch%s, %d batches an epoch",
        len(data.images),
        data.num_train_images,
        regular,
        data.batches_per_epoch(),
    )
    for index, dataset in enumerate(data.datasets):
        counts = ", ".join(f"{width}x{height}: {count}" for (width, height), count in data.bucket_counts(index).items())
        logger.info("dataset %d: batch size %d, %s", index + 1, dataset.options.batch_size, counts)
