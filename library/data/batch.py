"""What one training step sees."""

from dataclasses import dataclass, field, replace

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
        return Sizes(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def pin_memory(self) -> "Sizes":
        """The same sizes in memory out of which a GPU copies without waiting."""
        return Sizes(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


@dataclass(kw_only=True)
class Batch:
    """The samples of one step. Either `pixels` or `latents` is set, never both; `text` is set where it was cached."""

    images: list[str]  # paths, for messages
    captions: list[str]  # as the model shall read them: after dropout, shuffling, wildcards
    sizes: Sizes
    loss_weights: Tensor  # (batch,) float32
    draws: list[tuple[int, int]] = field(default_factory=list)  # (image, repeat) of each sample: keys of its noise and timestep
    pixels: Tensor | None = None  # (batch, 3, height, width) float32 in [-1, 1]
    latents: Tensor | None = None  # (batch, channels, height / 8, width / 8) float32, model-ready
    mask: Tensor | None = None  # (batch, 1, height / 8, width / 8) float32 in [0, 1]: how much each place counts in the loss
    text: TextStates | None = None
    network_multiplier: float = 1.0  # strength of the network for this batch
    preserves: Tensor | None = None  # (batch,) bool: samples whose target is what the base model predicts
    epoch: int = 0
    position: int = 0  # index of the batch in its epoch, over all ranks

    def pin_memory(self) -> "Batch":
        """The same batch in memory out of which a GPU copies without waiting; torch's `DataLoader` calls it."""
        text = None if self.text is None else {name: tensor.pin_memory() for name, tensor in self.text.items()}
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, sizes=self.sizes.pin_memory(), text=text, **tensors)
