"""What a run knows of its states: when one is due, how it is named, which are kept, and which one it went on from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.data.dataset import TrainingData
from library.models.architecture import Architecture
from library.training.length import Length
from library.training.reproduction.inputs import Input
from library.training.save import Saver
from library.training.state.folder import Kind, Manifest, StateNames
from library.training.state.identity import Mismatch, field_of, identity, mismatches
from library.training.state.options import StateOptions

logger = get_logger(__name__)
Moment = Literal["step", "epoch"]
KEPT_ROLLING = 2  # states of --save_state_every_n_steps: should the newest be damaged, there is one before it


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A state that a run goes on from: verified, its manifest read. Those of sd-scripts have none."""

    folder: Path
    manifest: Manifest | None

    @property
    def seed(self) -> int | None:
        """The seed of its run, for a command that gives none."""
        return None if self.manifest is None else self.manifest.seed


@dataclass(kw_only=True)
class States:
    """The states of one run; its `standing` is where it goes on from."""

    options: StateOptions
    saver: Saver
    names: StateNames
    seed: int
    identity: dict[str, Any]  # of this run, known to the process that writes
    standing: Standing | None = None
    accepted: frozenset[str] = field(default_factory=frozenset)  # fields that differ from the state's, with the user's leave

    @classmethod
    def of(
        cls, arch: Architecture, options: OptionSet, data: TrainingData, seed: int, saver: Saver, accelerator: Accelerator,
        standing: Standing | None, inputs: Mapping[str, Input],
    ) -> "States":  # fmt: skip
        """The states of a run with these inputs (of `inputs_of`), which the main process must have.

        Raises `ValueError` on every rank where `standing` is the state of another run, naming what differs.
        """
        chosen = options[StateOptions]
        fields: dict[str, Any] = {}
        found: list[Any] = [None]
        if accelerator.is_main_process:
            fields = identity(arch, options, data, inputs, seed=seed, processes=accelerator.num_processes)
            found = [mismatches(standing.manifest.identity, fields) if standing and standing.manifest else []]
        differing: list[Mismatch] = broadcast_object_list(found)[0]
        if standing is not None:
            refuse_mismatches(standing, differing, chosen.allow_resume_mismatch)
        return cls(
            options=chosen, saver=saver, names=names_of(saver), seed=seed, identity=fields, standing=standing,
            accepted=frozenset(field_of(each.field) for each in differing),
        )  # fmt: skip

    def due(self, moment: Moment, *, step: int, epoch: int, length: Length) -> Kind | None:
        """Which kind of state is saved now, after a step or an epoch; the one after the last step is that of the end."""
        options = self.options
        if moment == "epoch":
            return "epoch" if options.save_state and self.saver.due_after_epoch(epoch, length.epochs) else None
        if step == length.steps:
            return "end" if options.save_state or options.save_state_on_train_end else None
        if options.save_state and self.saver.due_after_step(step):
            return "step"
        every = options.save_state_every_n_steps
        return "rolling" if every is not None and step % every == 0 else None

    def outdated(self, new: Manifest, others: Iterable[tuple[Path, Manifest]], length: Length) -> list[Path]:
        """The states that need not be kept once `new` stands: of the same run, and never the one that `--resume` names."""
        own = [(path, state) for path, state in others if state.session == new.session and not self._is_named(path)]
        gone = [path for path, state in own if state.kind == "interrupted" and state.step < new.step]
        if new.kind == "epoch":
            every = self.saver.every_n_epochs(length.epochs) or 1
            keep = self.options.save_last_n_epochs_state or self.saver.options.save_last_n_epochs
            if keep:
                gone += [path for path, state in own if state.kind == "epoch" and state.epoch <= new.epoch - every * keep]
        if new.kind in ("step", "rolling"):
            span = self.options.save_last_n_steps_state or (self.saver.options.save_last_n_steps if new.kind == "step" else None)
            same = sorted((state.step, path) for path, state in own if state.kind == new.kind and state.step < new.step)
            if span:
                gone += [path for step, path in same if step < new.step - span]
            elif new.kind == "rolling":
                gone += [path for _, path in same[: 1 - KEPT_ROLLING]]
        return gone

    def _is_named(self, path: Path) -> bool:
        """Does `--resume` name this folder? The same command must find it again."""
        named = self.standing is not None and self.options.resume not in (None, "auto")
        return named and self.standing is not None and path.resolve() == self.standing.folder.resolve()


def names_of(saver: Saver) -> StateNames:
    """The names of the states beside a run's files."""
    return StateNames(saver.folder, saver.options.output_name)


def refuse_mismatches(standing: Standing, differing: Iterable[Mismatch], allowed: Iterable[str]) -> None:
    """Raise `ValueError` with every field that differs and is not allowed to; say which do with the user's leave, and which do not."""
    differing, allowed = list(differing), list(allowed)
    refused = [each for each in differing if not {each.field, field_of(each.field)} & set(allowed)]
    if refused:
        lines = "\n".join(f"  {each.sentence()}" for each in refused)
        names = " ".join(dict.fromkeys(field_of(each.field) for each in refused))
        raise ValueError(
            f"--resume {standing.folder}: it is the state of another run:\n{lines}\n"
            f"give the command of the state's run, or go on all the same with --allow_resume_mismatch {names}"
        )
    for each in differing:
        logger.warning("--allow_resume_mismatch: %s", each.sentence())
    names = {name for each in differing for name in (each.field, field_of(each.field))}
    for name in [name for name in allowed if name not in names]:
        logger.warning("--allow_resume_mismatch %s has no effect: it is the same in the state", name)
