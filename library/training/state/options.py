"""The options of states: when one is saved, which are kept, and from which one a run goes on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from library.core.options import option
from library.core.rules import Rule
from library.core.spelling import unknown
from library.training.state.identity import FIELDS, field_names, field_of

AUTO = "auto"


def _no_epoch_states(values: dict[str, Any]) -> bool:
    return not (values["save_state"] and (values["save_every_n_epochs"] or values["save_n_epoch_ratio"]))


def _no_step_states(values: dict[str, Any]) -> bool:
    return not ((values["save_state"] and values["save_every_n_steps"]) or values["save_state_every_n_steps"])


@dataclass(kw_only=True, frozen=True)
class StateOptions:
    """States: stopping and going on."""

    save_state: bool = option(False, help="save the run's state beside every saved network, and at the end: --resume goes on from it")
    save_state_on_train_end: bool = option(False, help="save the run's state at its end only")
    save_state_every_n_steps: int | None = option(
        None, help="save the run's state after every n optimizer steps, without a network file; the two newest of these are kept"
    )
    save_last_n_epochs_state: int | None = option(
        None, help="keep the epoch states of the last n epochs only; as --save_last_n_epochs where absent"
    )
    save_last_n_steps_state: int | None = option(
        None, help="keep the step states of the last n steps only; as --save_last_n_steps where absent"
    )
    resume: str | None = option(
        None, help="go on from this state (a folder), bit for bit; auto: from the newest whole one of this output name, or anew"
    )
    allow_resume_mismatch: tuple[str, ...] = option((), help="go on although these differ between the run of the state and this one")
    initial_step: int | None = option(
        None, help="begin after this many optimizer steps: the data and the schedule of those are left out; wins over a state's place"
    )
    initial_epoch: int | None = option(None, help="begin with this epoch, counted from 1; the same as the --initial_step of its beginning")
    skip_until_initial_step: bool = option(
        False, help="accepted for sd-scripts' commands: the data before the place where a run begins is always left out"
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(option="save_state_on_train_end", when=lambda v: v["save_state"], because="--save_state saves one at the end too"),
        Rule(
            option="save_last_n_epochs_state",
            when=_no_epoch_states,
            because="there are no epoch states without --save_state and --save_every_n_epochs or --save_n_epoch_ratio",
        ),
        Rule(
            option="save_last_n_steps_state",
            when=_no_step_states,
            because="there are no step states without --save_state_every_n_steps, or --save_state and --save_every_n_steps",
        ),
        Rule(option="allow_resume_mismatch", when=lambda v: v["resume"] is None, because="there is no --resume"),
        Rule(
            option="skip_until_initial_step",
            when=lambda v: v["resume"] is None and v["initial_step"] is None and v["initial_epoch"] is None,
            because="the run begins at its first step; give --resume, --initial_step or --initial_epoch",
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: numbers below one, two places to begin, fields that no state is compared by."""
        for name in ("save_state_every_n_steps", "save_last_n_epochs_state", "save_last_n_steps_state", "initial_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.initial_step is not None and self.initial_step < 0:
            yield f"--initial_step {self.initial_step}: must not be negative"
        if self.initial_step is not None and self.initial_epoch is not None:
            yield "--initial_step and --initial_epoch exclude each other: both say where the run begins"
        if self.resume is not None and not self.resume.strip():
            yield "--resume: name the folder of a state, or auto"
        known = field_names() if self.allow_resume_mismatch else []  # asks every family
        for name in self.allow_resume_mismatch:
            if field_of(name) not in known:
                yield f"--allow_resume_mismatch: {unknown(name, known, 'field')}; besides options: {', '.join(FIELDS)}"

    @property
    def saves(self) -> bool:
        """Are states saved while the run goes on, or at its end?"""
        return bool(self.save_state or self.save_state_on_train_end or self.save_state_every_n_steps)

    @property
    def moves_start(self) -> bool:
        """Does the user say where the run begins?"""
        return self.initial_step is not None or self.initial_epoch is not None
