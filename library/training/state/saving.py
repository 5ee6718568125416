"""Saving a state: gathered from all ranks, written by one, verified, put in its place, and only then are old ones removed."""

from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from library.core.clock import now
from library.core.disk_space import amount, lacking
from library.core.log import get_logger
from library.core.version import hadron_version
from library.training.setup import Run
from library.training.state.content import content_of, packed_parts, write_content
from library.training.state.folder import (
    BrokenState,
    Kind,
    Manifest,
    read_manifest,
    remove_state,
    staged_state,
    verified,
    write_manifest,
)
from library.training.state.states import Moment, States

logger = get_logger(__name__)
SUPPOSED = 8  # bytes of optimizer state a parameter, before the first step: those of AdamW
LAST = ("end", "interrupted")
"""Kinds after which the run ends: there is no later one that could make up for it."""


def keep_state(run: Run, states: States, moment: Moment) -> Path | None:
    """Save a state where one is due after this step or epoch, then remove what it outdates; returns its folder. Every rank calls it."""
    kind = states.due(moment, step=run.step, epoch=run.epoch, length=run.length)
    return None if kind is None else save_state(run, states, kind)


def save_state(run: Run, states: States, kind: Kind) -> Path | None:
    """Save the run's state as it is now, and remove what it outdates; returns its folder. Every rank calls it.

    Where it cannot be saved (a full disk, for example) what was saved before stays whole: a warning says why, the run goes on and None
    is returned. After the last state of a run, on its end or interruption, that is a `ValueError` on every rank.
    """
    place = states.names.place(kind, step=run.step, epoch=run.epoch)
    run.log.event("state", run.step, run.epoch, folder=place.name)  # before the state keeps the log's length, so that it is part of it
    content = content_of(run)
    outcome: list[str | None] = [None]
    if run.accelerator.is_main_process:
        try:
            manifest = _manifest(run, states, kind)
            if kind != "interrupted" or not _stands(place, manifest):
                remove_old_states(states, run, write_state(place, content, manifest))
                if run.uploads is not None:
                    run.uploads.send(place, "state")
        except (OSError, ValueError) as error:
            outcome = [f"{place}: the state of step {run.step} could not be saved: {error}"]
    run.team.meet("the state is saved")  # as long as it takes; a collective has a timeout
    [problem] = broadcast_object_list(outcome)
    if problem is None:
        return place
    if kind in LAST:
        raise ValueError(problem)
    logger.warning("%s\nwhat was saved before is untouched, and the run goes on", problem)
    return None


def write_state(place: Path, content: dict, manifest: Manifest) -> Manifest:
    """Write a state into its place; returns its manifest with the files. A state that stood there is whole until this one is.

    Raises `ValueError` for a disk without room for it and for what no state can hold, `BrokenState` where the disk did not keep it.
    """
    text, tensors = packed_parts(content)
    size = len(text) + sum(tensor.nbytes for found in tensors.values() for tensor in found.values())
    if (problem := lacking(place.parent, size, "it")) is not None:
        raise ValueError(problem)
    with staged_state(place) as folder:
        manifest = Manifest(**{**vars(manifest), "files": write_content(folder, text, tensors)})
        write_manifest(folder, manifest)
    logger.info("saved %s (step %d, %s)", place, manifest.step, amount(size))
    return manifest


def remove_old_states(states: States, run: Run, new: Manifest) -> None:
    """Remove the run's states that are outdated by `new`, which stands and was verified."""
    known = []
    for path in states.names.all():
        try:
            known.append((path, read_manifest(path)))
        except BrokenState:  # not for us to remove: it may be of another tool, and `--resume` names it
            continue
    for path in states.outdated(new, known, run.length):
        logger.info("removing %s", path.name)
        if run.uploads is None:
            _remove(path)
        else:
            run.uploads.release(path, partial(_remove, path))


def tell_space(run: Run, states: States) -> None:
    """Warn before the first step where the disk has no room for the states that the run will save, as far as their size is known."""
    options = states.options
    if not options.saves:
        return
    size = expected_size(run.trained.network, run.trained.parameters)
    problem = lacking(states.names.folder, size, "a state of this run")
    if problem is not None and run.accelerator.is_main_process:
        logger.warning("%s; without it the last states stay, and the run goes on without new ones", problem)


def expected_size(network: nn.Module, parameters: list[nn.Parameter]) -> int:
    """About how many bytes a state takes: the network, and what AdamW keeps of every trained parameter."""
    held = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    return held + SUPPOSED * sum(parameter.numel() for parameter in parameters)


def prove_savable(run: Run) -> None:
    """Raises `ValueError` where the schedule or optimizer holds what no state can: before the first step, not at the first save."""
    try:
        packed_parts({"schedule": run.schedule.state_dict(), "optimizer": run.optimizer.state_dict()})
    except ValueError as error:
        raise ValueError(f"the state of this run could not be saved: {error}; leave --save_state out, or choose another one") from error


def _remove(path: Path) -> None:
    """Remove a state; one that cannot be removed is in nobody's way."""
    try:
        remove_state(path)
    except OSError as error:
        logger.warning("%s: could not be removed (%s)", path, error.strerror or error)


def _stands(place: Path, manifest: Manifest) -> bool:
    """Is there a whole state of this run and step already?"""
    try:
        there = verified(place)
    except BrokenState:
        return False
    return (there.session, there.step, there.stands) == (manifest.session, manifest.step, manifest.stands)


def _manifest(run: Run, states: States, kind: Kind) -> Manifest:
    return Manifest(
        made_by=f"hadron {hadron_version()}, torch {torch.__version__}",
        kind=kind,
        stands="epoch" if kind == "epoch" else "step",
        step=run.step,
        epoch=run.epoch,
        saved_at=now(),
        session=run.metadata.get("ss_session_id", ""),
        seed=states.seed,
        identity=states.identity,
        files={},
    )
