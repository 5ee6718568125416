"""Going on: the state that `--resume` means is found and verified before anything is loaded, and put back once the run is set up."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.optim.lr_scheduler import LRScheduler

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.core.spelling import nearest
from library.core.tensor_file import listing
from library.training.length import RunOptions
from library.training.save import Saver
from library.training.setup import Run
from library.training.state.content import Content, read_content, restore_optimizer, restore_ranks, restore_rest, restore_weights
from library.training.state.folder import ASIDE, BrokenState, Stands, StateNames, read_manifest, tidy, verified
from library.training.state.identity import RATES
from library.training.state.legacy import is_legacy, resume_legacy
from library.training.state.options import AUTO, StateOptions
from library.training.state.saving import prove_savable, tell_space
from library.training.state.states import Standing, States, names_of

logger = get_logger(__name__)
SCHEDULE = frozenset({"length", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps",
                      "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio"})  # fmt: skip
"""Fields after whose change the schedule is not the state's, but this run's, at the state's step."""
ALPHAS = frozenset({"network_alpha", "network_args"})
"""Fields after whose change the alphas of the network are not the state's, but this run's."""


# Before anything is loaded


def check_resumable(options: OptionSet, saver: Saver, accelerator: Accelerator, folder: Path | None = None) -> Standing | None:
    """The state that `--resume` means, verified; None for a run that begins anew. Every rank calls it.

    Clears up what a killed run left of its states. `folder` stands in for `--resume`, where that was fetched from elsewhere. Raises
    `ValueError` on every rank for a folder that is missing, damaged, no state, or not to be seen by all of them.
    """
    asked = options[StateOptions].resume if folder is None else str(folder)
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            names = names_of(saver)
            tidy(names)
            found = [_chosen(asked, names), None]
        except ValueError as error:
            found = [None, str(error)]
    [chosen, problem] = broadcast_object_list(found)
    if problem is not None:
        raise ValueError(problem)
    if chosen is not None:
        _refuse_unseen(chosen, accelerator)
    return chosen


def _chosen(asked: str | None, names: StateNames) -> Standing | None:
    if asked is None:
        return None
    if asked == AUTO and not Path(AUTO).is_dir():
        return newest_state(names)
    return _named(Path(asked), names)


def newest_state(names: StateNames) -> Standing | None:
    """The newest whole state of a run. Raises `ValueError` where there are states and none is whole."""
    found, broken = _whole_states(names.all())
    for problem in broken:
        logger.warning("--resume auto: passed over: %s", problem)
    if found is not None:
        logger.info("--resume auto: goes on from %s (step %d)", found.folder, found.manifest.step if found.manifest else 0)
        return found
    if broken:
        raise ValueError(f"--resume auto: no state in {names.folder} is whole; remove them to begin anew")
    logger.info("--resume auto: no state of this output name in %s; the run begins anew", names.folder)
    return None


def _whole_states(folders: Iterable[Path]) -> tuple[Standing | None, list[str]]:
    """The newest of some states that is whole, and what is wrong with those that would be newer or cannot even be dated."""
    dated, broken = [], []
    for folder in folders:
        if is_legacy(folder):
            logger.info("%s: a state of sd-scripts; name it with --resume to go on from it", folder)
            continue
        try:
            dated.append((read_manifest(folder).age, folder))
        except BrokenState as error:
            broken.append(str(error))
    for _, folder in sorted(dated, reverse=True):
        try:
            return Standing(folder=folder, manifest=verified(folder)), broken
        except BrokenState as error:
            broken.append(str(error))
    return None, broken


def _named(folder: Path, names: StateNames) -> Standing:
    _bring_back(folder)
    if not folder.is_dir():
        there = [path.name for path in (*names.all(), *(folder.parent.glob("*-state") if folder.parent.is_dir() else ()))]
        near = nearest(folder.name, there)
        advice = (
            f"did you mean {near}?" if near else f"there are: {listing(dict.fromkeys(there))}" if there else "there are no states there"
        )
        raise ValueError(f"--resume {folder}: no such folder; {advice}")
    if is_legacy(folder):
        return Standing(folder=folder, manifest=None)
    try:
        return Standing(folder=folder, manifest=verified(folder))
    except BrokenState as error:
        near = (*folder.glob("*-state"), *folder.parent.glob("*-state"), *names.all())
        others = {path.resolve(): path for path in near if path.resolve() != folder.resolve()}
        good, _ = _whole_states(others.values())
        advice = f"the newest whole state is {good.folder} (step {good.manifest.step})" if good and good.manifest else "there is no other"
        raise ValueError(f"--resume {folder}: the state is not whole:\n{error}\n{advice}") from error


def _bring_back(folder: Path) -> None:
    """A state that stood aside when its run was ended, between moving it and putting the new one there."""
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    if aside.is_dir() and not folder.exists():
        os.replace(aside, folder)
        logger.warning("%s: stood aside when a run was ended while it replaced it; it is back", folder)


def _refuse_unseen(chosen: Standing, accelerator: Accelerator) -> None:
    """Raises `ValueError` on every rank where one does not see the same state."""
    sees = is_legacy(chosen.folder)
    if chosen.manifest is not None:
        try:
            sees = read_manifest(chosen.folder) == chosen.manifest
        except BrokenState:
            sees = False
    blind = gather_object([] if sees else [accelerator.process_index])
    if blind:
        ranks = ", ".join(map(str, blind))
        raise ValueError(f"--resume {chosen.folder}: rank {ranks} does not see it; copy it to the same place there, or use a shared disk")


# Once the run is set up


def resume(run: Run, states: States) -> Stands | None:
    """Put back the state that the run goes on from; returns what had been done when it was saved, None where nothing was. Every rank.

    Without a state, `--initial_step` and `--initial_epoch` are obeyed. Raises `ValueError` for what does not fit.
    """
    options, standing = states.options, states.standing
    if options.saves:
        prove_savable(run)
    tell_space(run, states)
    stands: Stands | None = None
    length: int | None = None  # of the log
    if standing is not None and standing.manifest is None:
        place_at(run, resume_legacy(run, standing.folder))
        advance(run.schedule, run.step)
    elif standing is not None and standing.manifest is not None:
        content = read_content(standing.folder)
        _restore(run, states, content)
        length, stands = content["log_length"], standing.manifest.stands
    if options.moves_start:
        _begin_where_told(run, options, is_resumed=standing is not None)
        stands = None
    if run.step > run.length.steps:
        raise ValueError(
            f"--resume: the state has made {run.step} steps, and this run ends after {run.length.steps}; nothing would be left"
        )
    if run.step or standing is not None:
        run.log.rewind(run.step, None if options.moves_start else length)  # later lines are of steps that are made again
        logger.info("goes on after step %d of %d, in epoch %d", run.step, run.length.steps, run.epoch)
    if standing is not None and run.step == run.length.steps:
        logger.warning("the run of this state is finished: %d of %d steps are made", run.step, run.length.steps)
    return stands


def place_at(run: Run, step: int) -> None:
    """Let the run begin after so many optimizer steps: of its data, only what comes then is seen."""
    epoch, within = divmod(step, run.length.steps_per_epoch)
    run.step, run.epoch, run.taken = step, epoch + 1, within * run.options[RunOptions].gradient_accumulation_steps


def advance(schedule: LRScheduler, steps: int) -> None:
    """Let a fresh schedule make so many steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer makes none
        for _ in range(steps):
            schedule.step()


def _restore(run: Run, states: States, content: Content) -> None:
    place = content["place"]
    restore_weights(run, content["weights"], alphas=not states.accepted & ALPHAS)
    if "optimizer_type" in states.accepted:
        logger.warning("the optimizer is another one and begins without the state's memory")
        advance(run.schedule, place["step"])
    else:
        _restore_optimizer(run, states, content)
    restore_rest(run, content)
    run.step, run.epoch, run.taken = place["step"], place["epoch"], _taken(run, states, place["taken"])
    if not restore_ranks(run, content["ranks"]):
        logger.warning("the state has no generators of rank %d; it keeps its own", run.accelerator.process_index)


def _restore_optimizer(run: Run, states: States, content: Content) -> None:
    """Optimizer and schedule; what the user changed with leave is this run's."""
    new_rates = bool(states.accepted & (RATES | SCHEDULE))
    own = {"lr", "initial_lr"} if new_rates else set()
    if "optimizer_args" in states.accepted:
        own |= {text.split("=", 1)[0].strip() for text in run.options.values()["optimizer_args"]}
    fresh = [{name: group[name] for name in own & group.keys()} for group in run.optimizer.param_groups]
    restore_optimizer(run, content["optimizer"])
    for group, values in zip(run.optimizer.param_groups, fresh, strict=True):
        group.update(values)
    if new_rates:
        advance(run.schedule, content["place"]["step"])
    else:
        run.schedule.load_state_dict(content["schedule"])


def _taken(run: Run, states: States, taken: int) -> int:
    """Batches of the epoch in progress that this rank had; where the number of ranks changed, so many that none is skipped."""
    then = states.standing.manifest.identity["processes"] if states.standing and states.standing.manifest else 1
    now = run.accelerator.num_processes
    return min(taken if then == now else taken * then // now, run.data.batches_per_epoch(now))


def _begin_where_told(run: Run, options: StateOptions, *, is_resumed: bool) -> None:
    """Obey `--initial_step` and `--initial_epoch`. Raises `ValueError` for a place behind the run's end."""
    epoch = options.initial_epoch
    step = options.initial_step if epoch is None else (epoch - 1) * run.length.steps_per_epoch
    given = f"--initial_epoch {epoch}" if epoch is not None else f"--initial_step {step}"
    assert step is not None, "one of them moves the start"
    if step >= run.length.steps:
        raise ValueError(f"{given}: the run has {run.length.steps} steps in {run.length.epochs} epochs; nothing would be left of it")
    place_at(run, step)
    if is_resumed:
        logger.warning("%s: the data goes on after step %d; weights, optimizer and schedule are the state's", given, step)
    else:
        advance(run.schedule, step)
        logger.warning("%s: data and schedule begin after step %d; the optimizer begins without a memory", given, step)
