"""TensorBoard and Weights & Biases, through accelerate's trackers. One that fails is said, and the run goes on."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from library.core.config_file import read_toml
from library.core.log import get_logger
from library.core.options import OptionError
from library.core.spelling import unknown
from library.training.tracking.options import PROJECT, LogOptions

logger = get_logger(__name__)

MOST_FAILURES = 5  # in a row, before a tracker is left alone
CONFIG = "--log_tracker_config"


def start_trackers(accelerator: Accelerator, options: LogOptions, config: Mapping[str, Any]) -> None:
    """Start the trackers that the options name; `config` are the options of the run, which they keep with `--log_config`.

    Raises `ValueError` where one cannot be started: now, not after the models are loaded.
    """
    if not options.trackers:
        return
    arguments = tracker_arguments(options)
    try:
        accelerator.init_trackers(options.log_tracker_name or PROJECT, _plain(config) if options.log_config else None, arguments)
    except Exception as error:
        raise ValueError(f"--log_with: {_named(options.trackers)} could not be started: {_said(error)}{_advice(options)}") from error


def send(accelerator: Accelerator, figures: Mapping[str, float], step: int) -> None:
    """Send figures of a step to every tracker. One that fails is said once and tried again; after some failures in a row it is left."""
    for tracker in list(accelerator.trackers):
        failures = getattr(tracker, "failures_in_a_row", 0)
        try:
            tracker.log(dict(figures), step=step)
            failures = 0
        except Exception as error:
            failures += 1
            if failures == 1:
                logger.warning("%s did not take the figures of step %d, the run goes on: %s", tracker.name, step, _said(error))
        if failures == MOST_FAILURES:
            logger.warning("%s failed %d times in a row and gets no more figures; log.jsonl has them all", tracker.name, failures)
            accelerator.trackers.remove(tracker)
        tracker.failures_in_a_row = failures


def finish_trackers(accelerator: Accelerator) -> None:
    """Let every tracker write what it holds, and forget them all. What fails is a warning."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:
            logger.warning("%s could not be finished; what it was sent last may be missing there: %s", tracker.name, _said(error))
    accelerator.trackers = []


def tracker_arguments(options: LogOptions) -> dict[str, dict[str, Any]]:
    """What each tracker is started with: its table of `--log_tracker_config`, and over it the options of the command line.

    Raises `OptionError` for tables and keys that no tracker knows.
    """
    given = _tables(options)
    if "wandb" in options.trackers:
        given["wandb"] = {**given.get("wandb", {}), **_wandb_arguments(options, given.get("wandb", {}))}
    return given


def _wandb_arguments(options: LogOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """W&B notes the command line of a process by itself, where tokens may stand: that is turned off, `--log_config` keeps the options."""
    settings: dict[str, Any] = {**given.get("settings", {}), "x_disable_meta": True}
    if options.wandb_api_key is not None:
        settings["api_key"] = options.wandb_api_key
    own = {"name": options.wandb_run_name, "dir": options.logging_dir}
    return {"settings": settings, **{name: value for name, value in own.items() if value is not None}}


def _tables(options: LogOptions) -> dict[str, dict[str, Any]]:
    if options.log_tracker_config is None:
        return {}
    tables, problems = read_toml(Path(options.log_tracker_config), CONFIG)[0], []
    for name, table in tables.items():
        where = f"{CONFIG} {options.log_tracker_config}"
        if name not in options.trackers:
            problems.append(f"{where}: {unknown(name, options.trackers, 'tracker of this run')}")
        elif not isinstance(table, dict):
            problems.append(f"{where}: {name} must be a table: write [{name}] and its arguments below")
        else:
            known = _parameters(name)
            problems += [f"{where} [{name}]: {unknown(key, known, 'argument')}" for key in table if key not in known]
    if problems:
        raise OptionError(problems)
    return tables


def _parameters(tracker: str) -> tuple[str, ...]:
    """The arguments that a tracker is started with, without those that come from options of their own."""
    if tracker == "wandb":
        import wandb

        start, taken = wandb.init, {"project", "config"}
    else:
        from torch.utils.tensorboard.writer import SummaryWriter

        start, taken = SummaryWriter, {"log_dir"}
    return tuple(name for name in inspect.signature(start).parameters if name not in taken)


# Words


def _plain(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Options as trackers take them: what is no number or truth value becomes a text."""
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in values.items()}


def _named(trackers: tuple[str, ...]) -> str:
    return " or ".join(trackers)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")


def _advice(options: LogOptions) -> str:
    if "wandb" not in options.trackers:
        return ""
    return "; without a network the environment variable WANDB_MODE=offline keeps the run in a folder for `wandb sync`"
