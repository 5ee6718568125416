"""The data of a run: which batches an epoch has, and what each of them holds, for any number of workers and ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from library.core.options import OptionError
from library.data.batch import Batch, TextStates
from library.data.captions.composing import every_caption
from library.data.config import Dataset
from library.data.entries import ImageEntry
from library.data.images.masks import pooled_mask
from library.data.options import DataOptions, Size, SubsetOptions
from library.data.order import BatchPlan, Sample, batch_count, epoch_order
from library.data.views import Clock, View, Viewer, sizes_of_views

MOST_CAPTIONS = 100  # that wildcards may make of one image's caption, for the text cache


class Latents(NamedTuple):
    """An image encoded: latents (channels, height / 8, width / 8) float32, and its mask (height / 8, width / 8) where it has one."""

    latents: Tensor
    mask: Tensor | None = None


class LatentStore(Protocol):
    """Where cached latents come from."""

    @property
    def in_memory(self) -> bool:
        """Is nothing read from files?"""
        ...

    def latents(self, image: int, flipped: bool) -> Latents:
        """What was cached of one image, or of its mirror image."""
        ...


class TextStore(Protocol):
    """Where cached text states come from."""

    def states(self, caption: str) -> dict[str, Tensor]:
        """The states of one caption, without the batch dimension."""
        ...


class TrainingData:
    """The images of a run and their order. All of it is a pure function of the files, the options and the seed."""

    def __init__(
        self, datasets: Sequence[Dataset], images: Sequence[ImageEntry], options: DataOptions, seed: int, pixels_per_latent: int = 8
    ) -> None:
        self.datasets = list(datasets)
        self.images = list(images)
        self.options = options
        self.seed = seed
        self.pixels_per_latent = pixels_per_latent
        self.validation: TrainingData | None = None  # the images held out, in fixed batches of their own
        self.latents: LatentStore | None = None  # set by `caches.fill_latents`
        self.text: TextStore | None = None  # set by `caches.fill_text`
        self._viewer = Viewer(seed=seed, caption_variants=options.text_cache_variants if options.caches_text else 1)
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

    def set_clock(self, clock: Clock) -> None:
        """Say how long the run is: `token_warmup_step` below 1 becomes a number of steps, and captions are drawn by the step."""
        self._viewer = replace(self._viewer, clock=clock)
        in_steps: dict[int, SubsetOptions] = {}
        for image in self.images:
            share = image.options.token_warmup_step
            if 0 < share < 1 and id(image.options) not in in_steps:
                in_steps[id(image.options)] = replace(image.options, token_warmup_step=float(int(share * clock.steps)))
        if in_steps:
            self.images = [replace(image, options=in_steps.get(id(image.options), image.options)) for image in self.images]

    def captions_to_cache(self) -> dict[str, ImageEntry]:
        """Every caption that a use may read (the empty one where captions are dropped), with the first image that has it.

        Raises `OptionError` naming the images whose wildcards make more than `MOST_CAPTIONS` captions.
        """
        captions: dict[str, ImageEntry] = {}
        too_many: list[str] = []
        variants = self.options.text_cache_variants
        for image in self.images:
            if variants > 1:
                forms: list[str] | None = [self._viewer.variant(image, number) for number in range(variants)]
            else:
                forms = every_caption(image.caption, image.options, MOST_CAPTIONS)
            if forms is None:
                too_many.append(str(image.path))
            for caption in [*(forms or ()), *([""] if image.options.drops_captions else ())]:
                captions.setdefault(caption, image)
        if too_many:
            more = f"its wildcards make more than {MOST_CAPTIONS} captions; add --text_cache_variants 8, or do not cache text"
            raise OptionError([f"{path}: {more}" for path in too_many])
        return captions

    def order(self, epoch: int) -> list[BatchPlan]:
        """The batches of an epoch (counted from 0), over all ranks."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.images, self._batch_sizes(), seed=self.seed, epoch=epoch))
        return self._order[1]

    def view(self, epoch: int, sample: Sample, position: int = 0) -> View:
        """What one sample of an epoch shows (see `library.data.views`)."""
        return self._viewer.view(self.images[sample.image], epoch, sample, position)

    def batch(self, epoch: int, position: int) -> Batch:
        """The batch at a position of an epoch (over all ranks).

        Positions past the end, which complete the last step of several ranks, repeat batches from the start with loss weight 0.
        Raises `ValueError` naming an image that cannot be decoded.
        """
        plans = self.order(epoch)
        plan = plans[position % len(plans)]
        views = [self.view(epoch, sample, position) for sample in plan.samples]
        captions = [view.caption for view in views]
        weights = [self._loss_weight(view) if position < len(plans) else 0.0 for view in views]
        pixels, latents, mask = self._pictures(plan, views)
        preserves = torch.tensor([view.image.preserves for view in views])
        return Batch(
            images=[str(view.image.path) for view in views],
            captions=captions,
            sizes=sizes_of_views(views),
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            draws=[(sample.image, sample.repeat) for sample in plan.samples],
            pixels=pixels,
            latents=latents,
            mask=mask,
            text=self._text(captions),
            network_multiplier=self.datasets[plan.dataset].options.network_multiplier,
            preserves=preserves if preserves.any() else None,
            epoch=epoch,
            position=position,
        )

    def _batch_sizes(self) -> list[int]:
        return [dataset.options.batch_size for dataset in self.datasets]

    def _loss_weight(self, view: View) -> float:
        return self.options.prior_loss_weight if view.image.options.is_reg else 1.0

    def _pictures(self, plan: BatchPlan, views: Sequence[View]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Pixels or latents of a batch, and its mask at the latents' size where any of its images has one."""
        if self.latents is not None:
            stored = [self.latents.latents(sample.image, view.crop.flipped) for sample, view in zip(plan.samples, views, strict=True)]
            latents = torch.stack([each.latents for each in stored])
            return None, latents, _stacked_masks([each.mask for each in stored], *latents.shape[2:])
        pictures = [view.picture() for view in views]
        pixels = torch.stack([picture.pixels for picture in pictures])
        height, width = (side // self.pixels_per_latent for side in pixels.shape[2:])
        masks = [None if picture.mask is None else pooled_mask(picture.mask, height, width) for picture in pictures]
        return pixels, None, _stacked_masks(masks, height, width)

    def _text(self, captions: Sequence[str]) -> TextStates | None:
        if self.text is None:
            return None
        states = [self.text.states(caption) for caption in captions]
        return {name: torch.stack([each[name] for each in states]) for name in states[0]}


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


def _stacked_masks(masks: Sequence[Tensor | None], height: int, width: int) -> Tensor | None:
    """Masks (batch, 1, height, width), all ones for an image without one; None where none has one."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones(height, width) if mask is None else mask for mask in masks])[:, None]
