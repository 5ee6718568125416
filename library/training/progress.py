"""Seeing a run: the progress bar, the running mean of the loss, TensorBoard."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.core.log import ROOT_LOGGER, set_up_logging
from library.core.options import option


@dataclass(kw_only=True, frozen=True)
class LogOptions:
    """Logging."""

    logging_dir: str | None = option(None, help="folder for TensorBoard logs; none are written where absent")
    log_with: Literal["tensorboard"] | None = option(None, help="tracker; tensorboard where --logging_dir is given")
    log_prefix: str | None = option(None, help="put before the date in the name of the log folder")
    log_tracker_name: str | None = option(None, help="name of the tracker's project; network_train where absent")
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = option("INFO", help="least important lines to show")
    console_log_file: str | None = option(None, help="also write log lines to this file")
    console_log_simple: bool = option(False, help="log lines on the screen are the message alone, without time and level")
    log_config: bool = option(False, help="also keep all options of the run in the log, beside its curves")

    def check(self) -> Iterable[str]:
        """What is wrong: names of logs that nobody writes."""
        if self.logging_dir is None:
            for name in ("log_with", "log_prefix", "log_tracker_name", "log_config"):
                if getattr(self, name):
                    yield f"--{name} has no effect without --logging_dir"

    def set_up(self, *, is_main: bool) -> None:
        """Send the log lines of this process where the options say."""
        set_up_logging(self.console_log_level, self.console_log_file, is_main, self.console_log_simple)

    def project_dir(self) -> str | None:
        """The folder of this run's logs: `<logging_dir>/<log_prefix><date and time>`."""
        if self.logging_dir is None:
            return None
        return f"{self.logging_dir}/{self.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


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
        bar = tqdm(total=self._total, desc="steps", disable=not self._shown, smoothing=0.05)
        with logging_redirect_tqdm([ROOT_LOGGER]), bar as self._bar:
            yield

    def update(self, loss: float, rates: Mapping[str, float]) -> dict[str, float]:
        """Count one optimizer step; returns its figures by tracker key: `loss/current`, `loss/average`, and `rates` (`lr/<group>`)."""
        self.losses.append(loss)
        self._recent.append(loss)
        average = sum(self._recent) / len(self._recent)
        if self._bar is not None:
            self._bar.set_postfix(avr_loss=f"{average:.4f}", lr=f"{next(iter(rates.values()), 0.0):.2e}", refresh=False)
            self._bar.update()
        return {"loss/current": loss, "loss/average": average, **rates}

    def epoch_figures(self) -> dict[str, Any]:
        """The mean loss of the epoch that just ended, by tracker key."""
        return {"loss/epoch_average": sum(self._recent) / max(1, len(self._recent))}
