"""The progress bar of a run and the running mean of its loss."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.core.log import ROOT_LOGGER


class _Bar(tqdm):
    """A bar that ends no run: where the screen cannot be written to (it may be a file on a full disk), it is not."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar."""
        with suppress(OSError):
            super().display(msg, pos)

    def close(self) -> None:
        """Show the bar for the last time."""
        with suppress(OSError):
            super().close()


class Progress:
    """The bar and the figures of a run; `losses` keeps every optimizer step's loss."""

    def __init__(self, total_steps: int, steps_per_epoch: int, shown: bool) -> None:
        self.losses: list[float] = []
        self._recent: deque[float] = deque(maxlen=max(1, steps_per_epoch))
        self._total, self._shown = total_steps, shown
        self._bar: tqdm | None = None

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Show the bar; log lines go above it."""
        bar = _Bar(total=self._total, desc="steps", disable=not self._shown, smoothing=0.05)
        with logging_redirect_tqdm([ROOT_LOGGER]), bar as self._bar:
            yield

    def take_up(self, losses: Sequence[float], step: int) -> None:
        """Go on after the losses of earlier steps; `step` are made, some of which may have been left out."""
        self.losses[:] = losses
        self._recent.extend(losses)
        if self._bar is not None:
            self._bar.n = self._bar.initial = step
            self._bar.refresh()

    def update(self, loss: float, rates: Mapping[str, float]) -> dict[str, float]:
        """Count one optimizer step; returns its figures by tracker key: `loss/current`, `loss/average`, and `rates` (`lr/<group>`)."""
        self.losses.append(loss)
        self._recent.append(loss)
        average = sum(self._recent) / len(self._recent)
        if self._bar is not None:
            self._bar.set_postfix(avr_loss=f"{average:.4f}", lr=f"{next(iter(rates.values()), 0.0):.2e}", refresh=False)
            self._bar.update()
        return {"loss/current": loss, "loss/average": average, **rates}

    def skip(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Count one optimizer step that was left out; returns its figures."""
        if self._bar is not None:
            self._bar.update()
        return {"step/left_out": 1.0, **rates}

    def epoch_figures(self) -> dict[str, Any]:
        """The mean loss of the epoch that just ended, by tracker key."""
        return {"loss/epoch_average": sum(self._recent) / max(1, len(self._recent))}
