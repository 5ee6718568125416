"""States of sd-scripts, as accelerate writes them: read weights-only, and what does not fit is refused by name.

`model.safetensors` (or a .bin) holds the network, `optimizer.bin` and `scheduler.bin` pickles of tensors and numbers, `train_state.json`
the place. Sampler and generators are theirs alone: data and noise are drawn by keys here.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.core.log import get_logger
from library.training.optimizing.averaging import real_parameter, stepped
from library.training.setup import Run
from library.training.state.content import load_exactly
from library.training.state.folder import MANIFEST

logger = get_logger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OPTIMIZER, SCHEDULE, SCALER, PLACE = "optimizer.bin", "scheduler.bin", "scaler.pt", "train_state.json"
SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer", "momentum", "state1", "state2", "s", "p0", "z")
"""Entries of optimizers that have the shape of their weight."""


def is_legacy(folder: Path) -> bool:
    """Is this a state of sd-scripts?"""
    return not (folder / MANIFEST).exists() and (folder / OPTIMIZER).is_file() and _weights_file(folder) is not None


def resume_legacy(run: Run, folder: Path) -> int:
    """Take over weights and optimizer; returns how many optimizer steps were made. Raises `ValueError` for what does not fit."""
    weights = _weights_file(folder)
    assert weights is not None, "asked before"
    logger.info("--resume %s: a state of sd-scripts: %s", folder, run.trained.network.load_weights(weights))
    if run.average is not None:
        run.average.begin()
    _take_optimizer(run, folder / OPTIMIZER)
    scaler = run.accelerator.scaler
    if scaler is not None and (folder / SCALER).is_file():
        scaler.load_state_dict(_unpickled(folder / SCALER))
    steps = steps_of(folder, run.accelerator.num_processes)
    logger.warning(
        "%s: the order of its data and its generators are sd-scripts' own and cannot be taken over; the run goes on after step %d "
        "in the order of this trainer, with the schedule of this command", folder, steps,
    )  # fmt: skip
    return steps


def steps_of(folder: Path, processes: int) -> int:
    """The optimizer steps that a state has behind it: as its schedule counted them, for sd-scripts begins to count anew when it resumes.

    Raises `ValueError` where nothing says it.
    """
    told = _told(folder / PLACE)
    counted = None
    if (folder / SCHEDULE).is_file():
        last = _unpickled(folder / SCHEDULE).get("last_epoch")
        counted = last // processes if isinstance(last, int) and last % processes == 0 else None  # accelerate steps once a process
    if counted is None and told is None:
        raise ValueError(f"{folder}: neither {PLACE} nor {SCHEDULE} says how many steps were made; give --initial_step")
    if counted is not None and told is not None and abs(counted - told) > 1:
        logger.warning("%s: %s says step %d, and the schedule has made %d; the schedule is believed", folder, PLACE, told, counted)
    return counted if counted is not None else told or 0


def _told(path: Path) -> int | None:
    """What `train_state.json` says, which may be one more than was made."""
    if not path.is_file():
        return None
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["current_step"]
        return int(step)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _take_optimizer(run: Run, path: Path) -> None:
    state = _unpickled(path)
    if not isinstance(state.get("state"), dict) or not isinstance(state.get("param_groups"), list):
        raise ValueError(f"{path}: holds no optimizer's state")
    members = [member for group in stepped(run.optimizer).param_groups for member in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(members) != len(numbers):
        raise ValueError(f"{path}: is of {len(numbers)} weights, and this network trains {len(members)}")
    for number, member in zip(numbers, members, strict=True):
        shape = tuple(real_parameter(run.optimizer, member).shape)
        for key, kept in state["state"].get(number, {}).items():
            if key in SHAPED and isinstance(kept, Tensor) and tuple(kept.shape) != shape:
                raise ValueError(f"{path}: {key} of weight {number} is {list(kept.shape)}, and that weight is {list(shape)} here")
    own = [{name: group[name] for name in ("lr", "initial_lr") if name in group} for group in run.optimizer.param_groups]
    try:
        load_exactly(run.optimizer, state, run.optimizer.load_state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for group, rates in zip(run.optimizer.param_groups, own, strict=True):
        group.update(rates)  # the schedule of this command sets them


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _unpickled(path: Path) -> dict[str, Any]:
    """A pickle's tensors and plain values. Raises `ValueError` for one that holds anything else, which is not run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as tensors and numbers alone, and nothing else is unpickled: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no table")
    return found
