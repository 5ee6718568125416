"""What is measured of every step beside its loss: speed, and now and then norms, losses by timestep and memory.

Measuring changes nothing of the training and waits for the device only where something is due: then once, for all numbers together.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from library.data.batch import Batch
from library.models.architecture import Architecture
from library.training.adapters import TrainedNetwork
from library.training.length import Length
from library.training.step import BatchLoss
from library.training.tracking.bands import NAMES, BandMeans, band_sums
from library.training.tracking.norms import LayerKinds, unclipped
from library.training.tracking.options import LogOptions
from library.training.tracking.speed import Stopwatch, memory_figures


@dataclass(kw_only=True)
class Instruments:
    """The instruments of one run; every rank has its own and reads them at the same steps."""

    accelerator: Accelerator
    every: int  # steps, between readings of what the device holds; 0 for never
    last: int  # step of the run
    kinds: LayerKinds
    watch: Stopwatch
    bands: BandMeans
    _sums: Tensor  # (2, bands) of this rank since the last reading
    _norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, options: LogOptions, accelerator: Accelerator, arch: Architecture, trained: TrainedNetwork, length: Length
    ) -> "Instruments":
        """The instruments of a run whose network is made. Call it before engines wrap the models, whose layers it looks up by name."""
        every = options.log_norms_every_n_steps
        return cls(
            accelerator=accelerator,
            every=every,
            last=length.steps,
            kinds=LayerKinds.of(trained.network, trained.parameters, arch, trained.models),
            watch=Stopwatch(accelerator.num_processes),
            bands=BandMeans(-(-length.steps_per_epoch // max(1, every))),
            _sums=torch.zeros(2, len(NAMES), device=accelerator.device),
        )

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch, and how long each was waited for."""
        return self.watch.timed(batches)

    def see_loss(self, loss: BatchLoss, batch: Batch) -> None:
        """Count the losses of a batch; nothing waits for the device. Samples of weight 0, which only fill a turn up, do not count."""
        self.watch.count(len(batch.images))
        if self.every:
            counted = (batch.loss_weights > 0).to(loss.of_samples.device, non_blocking=True)
            self._sums += band_sums(loss.of_samples, loss.timesteps, counted)

    def see_gradients(self, step: int, total: float | None, limit: float) -> None:
        """Measure the gradients of the step in progress, where that is due. They have the norm `total` and were clipped to `limit`."""
        if self.is_due(step):
            self._norms = unclipped(self.kinds.gradient_norms(), total, limit)

    def figures(self, step: int) -> dict[str, float]:
        """What is known of a step that is made, by tracker key. Every rank must ask: what all ranks know together is exchanged."""
        speed = self.watch.stop()
        if not self.is_due(step):
            return speed
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if self.accelerator.num_processes > 1:
            sums = cast(Tensor, self.accelerator.reduce(sums, "sum"))
        norms, self._norms = self._norms | self.kinds.weight_norms(), {}
        numbers = torch.cat([sums.flatten(), torch.stack(list(norms.values()))]).tolist()  # the one wait for the device
        self.bands.add(numbers[: sums.numel()])
        known = dict(zip(norms, numbers[sums.numel() :], strict=True))
        return speed | known | self.bands.figures() | memory_figures(self.accelerator.device)

    def is_due(self, step: int) -> bool:
        """Whether what the device holds is read after this step: after every nth, the first and the last."""
        return self.every > 0 and (step % self.every == 0 or step in (1, self.last))

    def state_dict(self) -> dict[str, Any]:
        """What figures go on from, as plain numbers: for a saved state."""
        return {"samples": self.watch.samples, "bands": self.bands.state_dict(), "sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.watch.samples = int(state["samples"])
        self.bands.load_state_dict(state["bands"])
        self._sums.copy_(torch.tensor(state["sums"], dtype=self._sums.dtype))
