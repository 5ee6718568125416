"""What one sample of an epoch shows: its caption, crop and colours, as a pure function of seed, epoch, image and repeat."""

import random
from dataclasses import dataclass
from functools import partial

import torch

from library.core.keyed_random import keyed_random
from library.data.batch import Sizes
from library.data.captions.composing import composed_caption, drawn_caption, is_dropped
from library.data.entries import ImageEntry
from library.data.images.colors import ColorChange, drawn_color
from library.data.images.crops import Crop, drawn_crop
from library.data.images.pictures import Picture, load_picture
from library.data.order import Sample


@dataclass(frozen=True)
class View:
    """An image as one use shows it."""

    image: ImageEntry
    caption: str
    crop: Crop
    color: ColorChange | None = None

    def picture(self) -> Picture:
        """The pixels, and the mask where there is one. Raises `ValueError` naming an image that cannot be decoded."""
        image = self.image
        return load_picture(
            image.path,
            self.crop,
            interpolation=image.options.resize_interpolation,
            color=self.color,
            alpha=image.options.alpha_mask,
            mask=image.mask,
        )


@dataclass(frozen=True, kw_only=True)
class Clock:
    """From a place in the data to the optimizer step that uses it, for what changes in the course of a run."""

    steps: int = 0  # of the run
    steps_per_epoch: int = 0
    batches_per_step: int = 1  # over all ranks

    def step(self, epoch: int, position: int) -> int:
        """The optimizer step, counted from 0, of the batch at `position` of `epoch` (from 0)."""
        return epoch * self.steps_per_epoch + position // self.batches_per_step


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """Draws views. Batch size, position, rank and worker change nothing about them, but for the steps of `token_warmup_step`."""

    seed: int
    caption_variants: int  # 1: every use draws its own form of a caption; more: it draws one of so many that an image has
    clock: Clock = Clock()

    def view(self, image: ImageEntry, epoch: int, sample: Sample, position: int) -> View:
        """What a sample shows."""
        draws = partial(self._draw, epoch, sample)
        return View(
            image=image,
            caption=self._caption(image, epoch, sample, position),
            crop=drawn_crop(image.path, image.size, image.placement, image.options, draws),
            color=drawn_color(draws("color")) if image.options.color_aug else None,
        )

    def variant(self, image: ImageEntry, number: int) -> str:
        """Form `number` of an image's caption: of the caption alone, so that images which come or go change no other's forms."""
        return composed_caption(image.caption, image.options, keyed_random(self.seed, "variant", image.caption, number))

    def _draw(self, epoch: int, sample: Sample, purpose: str) -> random.Random:
        return keyed_random(self.seed, purpose, epoch, sample.image, sample.repeat)

    def _caption(self, image: ImageEntry, epoch: int, sample: Sample, position: int) -> str:
        draw, step = self._draw(epoch, sample, "caption"), self.clock.step(epoch, position)
        if self.caption_variants == 1:
            return drawn_caption(image.caption, image.options, epoch=epoch, step=step, draw=draw)
        if is_dropped(image.options, epoch, draw):
            return ""
        return self.variant(image, draw.randrange(self.caption_variants))


def sizes_of_views(views: list[View]) -> Sizes:
    """The size conditioning of a batch of views."""
    return Sizes(
        original=torch.tensor([view.image.size[::-1] for view in views]),
        crop=torch.tensor([view.crop.conditioning for view in views]),
        target=torch.tensor([view.crop.size[::-1] for view in views]),
    )
