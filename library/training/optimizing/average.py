"""The average of the weights over the steps (EMA): steadier than the weights of any one step.

Polyak & Juditsky 1992 for the idea; decay and warm-up as diffusion models are trained with: the average after n updates moves by
1 - min(decay, (1 + n) / (10 + n)) towards the weights, so that it does not hang on to where training began.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from library.core.options import option
from library.training.optimizing.averaging import is_schedule_free

AVERAGED = "_ema"  # how the name of a file with averaged weights ends


@dataclass(kw_only=True, frozen=True)
class AverageOptions:
    """Average of the weights."""

    ema_decay: float | None = option(
        None,
        help="also keep an average of the trained weights over the steps, 0.999 or 0.9999 for example: previews and validation show it, "
        "and it is saved beside every file as <name>_ema; none where absent",
    )

    def check(self) -> Iterable[str]:
        """What is wrong: a decay that averages nothing or never moves."""
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            yield f"--ema_decay {self.ema_decay:g}: must lie between 0 and 1; 0.999 keeps the last thousand steps or so"

    def misfits(self, kind: type[Optimizer]) -> Iterator[str]:
        """What cannot go with this class of optimizer."""
        if self.ema_decay is not None and is_schedule_free(kind):
            yield f"--ema_decay: {kind.__name__} averages the weights itself, and its average is what is saved and shown; leave one out"

    def remarks(self, scale_weight_norms: float | None) -> Iterator[str]:
        """What should be known about it, once."""
        if self.ema_decay is not None and scale_weight_norms is not None:
            yield (
                f"--ema_decay: --scale_weight_norms {scale_weight_norms:g} bounds the weights of every step; "
                "the deltas of averaged factors are near that bound, and may be above it"
            )


class WeightAverage:
    """A float32 average of parameters, on their devices. Equal on all ranks, whose weights are equal."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.begin()

    @classmethod
    def of(cls, options: AverageOptions, parameters: Sequence[nn.Parameter]) -> "WeightAverage | None":
        """The average that the options ask for, or None."""
        return None if options.ema_decay is None else cls(parameters, options.ema_decay)

    def begin(self) -> None:
        """Begin anew with the weights as they are."""
        self.updates = 0
        self._average = [parameter.detach().float().clone() for parameter in self.parameters]

    def update(self) -> None:
        """Move the average towards the weights, after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [parameter.detach().float() for parameter in self.parameters]
        get_ema_multi_avg_fn(decay)(self._average, current, self.updates)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the parameters hold the average, in their dtype; afterwards their own values again, bit for bit."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(kept)

    def state_dict(self) -> dict[str, Any]:
        """The average as it is, for a saved state: the number of updates, and tensors in the order of the parameters."""
        return {"updates": self.updates, "average": list(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved average. Raises `ValueError` where it is of other parameters."""
        found, own = [tuple(one.shape) for one in state["average"]], [tuple(one.shape) for one in self._average]
        if found != own:
            raise ValueError(f"the saved average has {len(found)} tensors of other shapes than the {len(own)} that are trained")
        self.updates = int(state["updates"])
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)

    @torch.no_grad()
    def _fill(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def average_shown(average: WeightAverage | None) -> AbstractContextManager[None]:
    """`average.shown()` where there is an average."""
    return nullcontext() if average is None else average.shown()


def averaged_file(file: Path) -> Path:
    """Where the averaged weights of a saved file stand: `<name>_ema.safetensors` beside it."""
    return file.with_stem(f"{file.stem}{AVERAGED}")
