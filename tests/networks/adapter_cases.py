"""Every algorithm on every kind of layer."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

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
# Ranks 2 and 8 at 12 x 18: LoHa by its ranks and by the whole delta, LoKr with low-rank and with whole second factor
SOME, KERNELS = ("linear-5d", "conv3x3", "conv3x3-grouped"), tuple(kind for kind in KINDS if kind.startswith("conv") and kind != "conv1x1")
MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "2": ({}, tuple(KINDS)),
    "8": ({}, tuple(KINDS)),
    "tucker": ({"use_tucker": True}, KERNELS),
    "scalar": ({"use_scalar": True}, SOME),
    "dora": ({"dora_wd": True}, (*SOME, "conv1d")),
    "dora-in": ({"dora_wd": True, "wd_on_output": False}, SOME),
    "all": ({"use_tucker": True, "use_scalar": True, "dora_wd": True, "dora_norm": "full"}, ("conv3x3", "conv3d")),
    "both": ({"decompose_both": True}, SOME),
    "full": ({"full_matrix": True}, SOME),
    "unbalanced": ({"unbalanced_factorization": True, "decompose_both": True}, SOME),
}
"""Mode -> network arguments, and the kinds of layers to try them on; arguments that an algorithm has not are not tried on it."""


def has_arguments(algorithm: type[Adapter], arguments: dict[str, Any]) -> bool:
    return set(arguments) <= {field.name for field in fields(algorithm.Arguments)}


CASES = {
    f"{algorithm.title}-{mode}-{kind}": (algorithm, 8 if mode == "8" else 2, kind, arguments)
    for algorithm in algorithms()
    for mode, (arguments, kinds) in MODES.items()
    for kind in kinds
    if has_arguments(algorithm, arguments)
}


VARIANTS = [
    (algorithm, mode) for algorithm in algorithms() for mode, (arguments, _) in MODES.items() if has_arguments(algorithm, arguments)
]
"""Every algorithm in every mode that it has."""


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
        for name, parameter in adapter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.copy_(parameter * (1 + noise) if name == "dora_scale" else 1.3 + noise if name == "scalar" else noise)
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
