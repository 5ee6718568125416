"""What is logged, and where."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from library.core.clock import dated
from library.core.log import set_up_logging
from library.core.options import option
from library.core.rules import Rule

NEEDS_FOLDER = ("tensorboard", "all")
PROJECT = "network_train"


def _without_wandb(values: dict[str, Any]) -> bool:
    return values["log_with"] not in ("wandb", "all")


@dataclass(kw_only=True, frozen=True)
class LogOptions:
    """Logging.

    Whatever is chosen here, every figure of a run stands in `log.jsonl` of its folder.
    """

    logging_dir: str | None = option(None, help="folder for TensorBoard logs; none are written where absent")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, help="tracker: tensorboard, wandb (Weights & Biases), or all for both; tensorboard where only --logging_dir is given"
    )
    log_prefix: str | None = option(None, help="put before the date in the name of the log folder")
    log_tracker_name: str | None = option(None, help=f"name of the tracker's project; {PROJECT} where absent")
    log_tracker_config: str | None = option(
        None, help="TOML file with more arguments of the trackers, in tables [wandb] and [tensorboard]; for example tags"
    )
    wandb_run_name: str | None = option(None, help="name of the run at Weights & Biases; it chooses one where absent")
    wandb_api_key: str | None = option(
        None, help="key of Weights & Biases; the environment variable WANDB_API_KEY or `wandb login` does it too", secret=True
    )
    log_norms_every_n_steps: int = option(
        10,
        help="after every n steps, also log norms of gradients and weights by kind of layer, losses by timestep, and memory; 0 for never",
    )
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = option("INFO", help="least important lines to show")
    console_log_file: str | None = option(None, help="also write log lines to this file")
    console_log_simple: bool = option(False, help="log lines on the screen are the message alone, without time and level")
    log_config: bool = option(False, help="also keep all options of the run with the tracker, beside its curves")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(option="wandb_run_name", when=_without_wandb, because="it is for --log_with wandb and all"),
        Rule(option="wandb_api_key", when=_without_wandb, because="it is for --log_with wandb and all"),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: names of logs that nobody writes, a tracker without its folder or its package."""
        if self.logging_dir is None and self.log_with in NEEDS_FOLDER:
            yield f"--log_with {self.log_with}: needs --logging_dir for TensorBoard's files"
        if self.logging_dir is None and self.log_prefix:
            yield "--log_prefix has no effect without --logging_dir"
        for name in ("log_tracker_name", "log_tracker_config", "log_config") if not self.trackers else ():
            if getattr(self, name):
                yield f"--{name} has no effect without a tracker; give --logging_dir for TensorBoard or --log_with wandb"
        if "wandb" in self.trackers and importlib.util.find_spec("wandb") is None:
            yield f"--log_with {self.log_with}: the package wandb is not installed; pip install wandb"
        if self.log_norms_every_n_steps < 0:
            yield f"--log_norms_every_n_steps {self.log_norms_every_n_steps}: must not be negative; 0 for never"

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that get the figures, as accelerate names them."""
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)

    def set_up(self, *, is_main: bool) -> None:
        """Send the log lines of this process where the options say."""
        set_up_logging(self.console_log_level, self.console_log_file, is_main, self.console_log_simple)

    def project_dir(self) -> str | None:
        """The folder of this run's TensorBoard logs: `<logging_dir>/<log_prefix><date and time>`."""
        if self.logging_dir is None:
            return None
        return f"{self.logging_dir}/{self.log_prefix or ''}{dated('%Y%m%d%H%M%S')}"
