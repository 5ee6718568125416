"""Every algorithm on every kind of layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.base import Adapter
from networks.members import algorithms


class OwnLinear(nn.Linear):
    """A subclass, as quantisation libraries make them."""


@dataclass(frozen=True)
class Kind:
    """A kind of layer with an input for it."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


KINDS = {
    "linear": Kind(lambda: nn.Linear(12, 18), (2, 5, 12)),
    "linear-5d": Kind(lambda: OwnLinear(18, 12, bias=False), (2, 1, 2, 3, 18)),
    "conv1x1": Kind(lambda: nn.Conv2d(12, 18, 1), (2, 12, 4, 3)),
    "conv3x3": Kind(lambda: nn.Conv2d(12, 18, 3, stride=2, padding=1), (2, 12, 5, 5)),
    "conv3x3-reflect": Kind(lambda: nn.Conv2d(12, 18, 3, padding=1, padding_mode="reflect", dilation=1), (2, 12, 4, 4)),
    "conv3x3-grouped": Kind(lambda: nn.Conv2d(12, 18, 3, padding=1, groups=2), (2, 12, 4, 4)),
    "conv1d": Kind(lambda: nn.Conv1d(12, 18, 3, padding="same"), (2, 12, 6)),
    "conv3d": Kind(lambda: nn.Conv3d(12, 18, 3, padding=1), (2, 12, 2, 3, 3)),
}
RANKS = (2, 8)  # at 12 x 18: LoHa by its ranks and by the whole delta, LoKr with low-rank and with whole second factor
CASES = {f"{algorithm.title}-{rank}-{kind}": (algorithm, rank, kind) for algorithm in algorithms() for rank in RANKS for kind in KINDS}


@dataclass
class Case:
    """One adapter on one layer, with an input."""

    adapter: Adapter
    layer: nn.Module
    x: Tensor
    fresh: Callable[[nn.Module], Adapter]


def filled(adapter: Adapter, size: float = 0.3) -> Adapter:
    """The adapter with parameters as after training: none of them zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what was expected, in float64."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def predict(denoiser: nn.Module, seed: int = 3) -> Tensor:
    """The output of the small SDXL denoiser on a fixed input."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 192, generator=generator)
    added = {"text_embeds": torch.randn(1, 128, generator=generator), "time_ids": torch.zeros(1, 6)}
    return denoiser(latents, torch.tensor([5]), text, added_cond_kwargs=added).sample
