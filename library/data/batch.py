"""What one training step sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

TextStates = dict[str, Tensor]
"""Encoded text: a family's fixed set of tensors, each with the batch in dimension 0 (SDXL: `hidden_states`, `pooled`)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Size conditioning of a batch, in pixels: each (batch, 2) int64, height before width, top before left."""

    original: Tensor
    crop: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> "Sizes":
        """The same sizes on another device."""
        return Sizes(original=self.original.to(device), crop=self.crop.to(device), target=self.target.to(device))


@dataclass(kw_only=True)
class Batch:
    """The samples of one step. Either `pixels` or `latents` is set, never both; `text` is set where it was cached."""

    images: list[str]  # paths, for messages
    captions: list[str]  # as the model shall read them: after dropout, shuffling, wildcards
    sizes: Sizes
    loss_weights: Tensor  # (batch,) float32
    pixels: Tensor | None = None  # (batch, 3, height, width) float32 in [-1, 1]
    latents: Tensor | None = None  # (batch, channels, height / 8, width / 8) float32, model-ready
    text: TextStates | None = None
    epoch: int = 0
    position: int = 0  # index of the batch in its epoch, over all ranks
