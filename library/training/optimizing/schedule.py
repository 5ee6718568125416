"""Learning-rate schedules: those of diffusers, transformers and torch by name, and REX, in optimizer steps."""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from library.core.log import get_logger, warn_once
from library.core.options import option
from library.core.rules import Rule
from library.core.spelling import unknown
from library.training.optimizing.averaging import innermost, is_schedule_free
from library.training.optimizing.constructor import arguments_for, parameters_of_call

logger = get_logger(__name__)

READS = {
    "warmup": "lr_warmup_steps",
    "decay": "lr_decay_steps",
    "stable": "lr_decay_steps",
    "cycles": "lr_scheduler_num_cycles",
    "half_cycles": "lr_scheduler_num_cycles",
    "power": "lr_scheduler_power",
    "timescale": "lr_scheduler_timescale",
    "floor": "lr_scheduler_min_lr_ratio",
}
"""What a shape takes -> the option it comes from; `total`, the steps of the run, comes from none."""


@dataclass(frozen=True)
class Shape:
    """A function that makes a schedule, and what it takes: parameter -> `total` or a name of `READS`."""

    path: str
    takes: dict[str, str]

    @property
    def options(self) -> frozenset[str]:
        """The options that this shape reads."""
        return frozenset(READS[what] for what in self.takes.values() if what in READS)


_RAMP = {"num_warmup_steps": "warmup", "num_training_steps": "total"}
_FLOOR = {**_RAMP, "num_cycles": "half_cycles", "min_lr_rate": "floor"}
SHAPES = {
    "constant": Shape("diffusers.optimization.get_constant_schedule_with_warmup", {"num_warmup_steps": "warmup"}),
    "constant_with_warmup": Shape("diffusers.optimization.get_constant_schedule_with_warmup", {"num_warmup_steps": "warmup"}),
    "linear": Shape("diffusers.optimization.get_linear_schedule_with_warmup", _RAMP),
    "cosine": Shape("diffusers.optimization.get_cosine_schedule_with_warmup", _RAMP),
    "cosine_with_restarts": Shape(
        "diffusers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup", {**_RAMP, "num_cycles": "cycles"}
    ),
    "polynomial": Shape("diffusers.optimization.get_polynomial_decay_schedule_with_warmup", {**_RAMP, "power": "power"}),
    "piecewise_constant": Shape("diffusers.optimization.get_piecewise_constant_schedule", {}),
    "inverse_sqrt": Shape("transformers.optimization.get_inverse_sqrt_schedule", {"num_warmup_steps": "warmup", "timescale": "timescale"}),
    "cosine_with_min_lr": Shape("transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup", _FLOOR),
    "cosine_warmup_with_min_lr": Shape("transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate", _FLOOR),
    "warmup_stable_decay": Shape(
        "transformers.optimization.get_wsd_schedule",
        {
            "num_warmup_steps": "warmup",
            "num_stable_steps": "stable",
            "num_decay_steps": "decay",
            "num_cycles": "half_cycles",
            "min_lr_ratio": "floor",
        },
    ),
    "rex": Shape("library.training.optimizing.rex.rex_schedule", {**_RAMP, "min_lr_ratio": "floor"}),
    "adafactor": Shape("diffusers.optimization.get_constant_schedule", {}),
}
ASK_FOR_LOSS = ("reduce_lr_on_plateau", "greedy", "reducelronplateau")
CHOSEN_ELSEWHERE = {"optimizer": "--optimizer_type", "last_epoch": "the run"}


def _unread(name: str) -> Callable[[dict[str, Any]], bool]:
    def in_vain(values: dict[str, Any]) -> bool:
        return bool(values["lr_scheduler_type"]) or name not in _shape(values["lr_scheduler"]).options

    return in_vain


def _readers(name: str) -> str:
    return ", ".join(known for known, shape in SHAPES.items() if name in shape.options)


@dataclass(kw_only=True, frozen=True)
class ScheduleOptions:
    """Learning-rate schedule."""

    lr_scheduler: str = option("constant", help=f"shape of the learning rate over the run: {', '.join(SHAPES)}")
    lr_scheduler_type: str = option(
        "", help="class of a schedule, instead of --lr_scheduler: of torch.optim.lr_scheduler by name (CosineAnnealingLR), or a dotted path"
    )
    lr_scheduler_args: tuple[str, ...] = option((), help="further arguments of the schedule as key=value, for example T_max=1000")
    lr_warmup_steps: int | float | str = option(0, help="warm-up: a number of steps, or a share of the run as 10% or 0.1")
    lr_decay_steps: int | float | str = option(0, help="decay at the end of warmup_stable_decay: steps, or a share of the run")
    lr_scheduler_num_cycles: int = option(1, help="restarts of cosine_with_restarts; with a floor, how often a cosine comes down to it")
    lr_scheduler_power: float = option(1.0, help="power of polynomial")
    lr_scheduler_timescale: int | None = option(None, help="steps over which inverse_sqrt falls; the warm-up (or 10000) where absent")
    lr_scheduler_min_lr_ratio: float | None = option(None, help="where the rate ends, as a share of the learning rate")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(option="lr_scheduler", when=lambda v: v["lr_scheduler_type"], because="--lr_scheduler_type names the schedule"),
        *(
            Rule(option=name, when=_unread(name), because=f"it is for --lr_scheduler {_readers(name)}")
            for name in dict.fromkeys(READS.values())
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: schedules and arguments that do not exist, numbers out of range, what a shape cannot do without."""
        problems = list(self._out_of_range())
        yield from problems
        try:
            arguments = self.arguments()
            missing = [] if self.lr_scheduler_type else list(self._missing(arguments))
            if not (self.lr_scheduler_type or problems or missing):  # made on trial, as for a run without end
                _made(torch.optim.SGD([torch.zeros(1)], lr=1.0), self, sys.maxsize)
            yield from missing
        except ValueError as error:
            yield from str(error).splitlines()

    def arguments(self) -> dict[str, Any]:
        """`--lr_scheduler_args` for the schedule that is named. Raises `ValueError` for a schedule or argument that does not exist."""
        made = _maker(self)
        taken = () if self.lr_scheduler_type else _shape(self.lr_scheduler).takes
        elsewhere = {name: "the run" if what == "total" else f"--{READS[what]}" for name, what in dict(taken).items()}
        return arguments_for(made, self.lr_scheduler_args, "--lr_scheduler_args", {**elsewhere, **CHOSEN_ELSEWHERE})

    def _out_of_range(self) -> Iterator[str]:
        for name in ("lr_warmup_steps", "lr_decay_steps"):
            try:
                steps_of(getattr(self, name), 100, f"--{name}")
            except ValueError as error:
                yield str(error)
        for name in ("lr_scheduler_num_cycles", "lr_scheduler_timescale"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.lr_scheduler_min_lr_ratio is not None and not 0 <= self.lr_scheduler_min_lr_ratio <= 1:
            yield f"--lr_scheduler_min_lr_ratio {self.lr_scheduler_min_lr_ratio:g}: must lie between 0 and 1"

    def _missing(self, arguments: dict[str, Any]) -> Iterator[str]:
        if self.lr_scheduler_min_lr_ratio is None and _shape(self.lr_scheduler).takes == _FLOOR and "min_lr" not in arguments:
            yield f"--lr_scheduler {self.lr_scheduler}: needs --lr_scheduler_min_lr_ratio, for example 0.1"
        if self.lr_scheduler_min_lr_ratio is not None and "min_lr" in arguments:
            yield "--lr_scheduler_args min_lr: --lr_scheduler_min_lr_ratio says where the rate ends; give one of them"
        if "decay" in _shape(self.lr_scheduler).takes.values() and self.lr_decay_steps in (0, "0"):
            yield f"--lr_scheduler {self.lr_scheduler}: needs --lr_decay_steps, for example 20%"


def steps_of(given: float | str, total: int, flag: str) -> int:
    """A length in optimizer steps: `100` is steps, `10%` and `0.1` are shares of `total`. Raises `ValueError`."""
    text = str(given)
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if not math.isfinite(number):
            raise ValueError
    except ValueError:
        raise ValueError(f"{flag} {text}: give steps (100) or a share of the run (10% or 0.1)") from None
    is_share = text.endswith("%") or (number < 1 and number != int(number))
    if number < 0 or (is_share and number > 1) or (not is_share and number != int(number)):
        raise ValueError(f"{flag} {text}: give whole steps, or a share between 0 and 1")
    return round(number * total) if is_share else int(number)


def build_schedule(optimizer: Optimizer, options: ScheduleOptions, total: int) -> LRScheduler:
    """The schedule over `total` optimizer steps of the run, all ranks together; step it once after every optimizer step.

    Raises `ValueError` for a schedule that does not fit the optimizer or the length of the run.
    """
    inner = innermost(optimizer)
    problems = list(misfits(type(inner), options, relative_step=any(group.get("relative_step") for group in inner.param_groups)))
    if problems:
        raise ValueError("\n".join(problems))
    return _made(optimizer, options, total)


def try_schedule(optimizer: Optimizer, options: ScheduleOptions, total: int) -> None:
    """Make a schedule for an optimizer that nothing else needs, and ask it for the last rate of the run.

    Raises `ValueError` for a schedule that cannot be made, or that would stop the run before its end.
    """
    schedule = _made(optimizer, options, total)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer did not step
            schedule.last_epoch = total - 1
            schedule.step()
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{_shown(options)}: fails in a run of {total} steps: {error}") from error


def misfits(optimizer: type[Optimizer], options: ScheduleOptions, *, relative_step: bool) -> Iterator[str]:
    """What is wrong between an optimizer and a schedule; `relative_step` is said of an Adafactor that finds its own rate."""
    named, flag = options.lr_scheduler_type or _name(options.lr_scheduler), _flag(options)
    warms_up = steps_of(options.lr_warmup_steps, 100, "--lr_warmup_steps") > 0
    if is_schedule_free(optimizer) and (named != "constant" or warms_up):
        own = " and --optimizer_args warmup_steps=N" if "warmup_steps" in parameters_of_call(optimizer) else ""
        yield f"{flag} {named}: {optimizer.__name__} needs no schedule; use --lr_scheduler constant without warm-up{own}"
    if relative_step and (named not in ("constant", "adafactor") or (warms_up and named == "constant")):
        yield f"{flag} {named}: Adafactor with relative_step=True finds its own rate; use --lr_scheduler adafactor without warm-up"
    if named == "adafactor" and not relative_step:
        yield "--lr_scheduler adafactor: is for --optimizer_type Adafactor with --optimizer_args relative_step=True"


# What a shape is made of


def _made(optimizer: Optimizer, options: ScheduleOptions, total: int) -> LRScheduler:
    arguments = options.arguments()
    if not options.lr_scheduler_type:
        values = _values(options, total)
        taken = {name: values[what] for name, what in _shape(options.lr_scheduler).takes.items()}
        arguments |= {name: value for name, value in taken.items() if value is not None}
    try:
        return _maker(options)(optimizer, **arguments)
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, NotImplementedError) as error:
        raise ValueError(f"{_shown(options)}: {str(error) or type(error).__name__}") from error


def _values(options: ScheduleOptions, total: int) -> dict[str, Any]:
    warmup = steps_of(options.lr_warmup_steps, total, "--lr_warmup_steps")
    decay = steps_of(options.lr_decay_steps, total, "--lr_decay_steps")
    takes = _shape(options.lr_scheduler).takes.values()
    if "stable" in takes and warmup + decay > total:
        raise ValueError(
            f"--lr_warmup_steps {options.lr_warmup_steps} and --lr_decay_steps {options.lr_decay_steps}: together longer than the run"
        )
    if "warmup" in takes and warmup > total:
        warn_once(logger, f"--lr_warmup_steps {warmup}: the run ends after {total}, before the full learning rate")
    return {
        "total": total, "warmup": warmup, "decay": decay, "stable": total - warmup - decay, "cycles": options.lr_scheduler_num_cycles,
        "half_cycles": options.lr_scheduler_num_cycles / 2, "power": options.lr_scheduler_power,
        "timescale": options.lr_scheduler_timescale, "floor": options.lr_scheduler_min_lr_ratio,
    }  # fmt: skip


def _flag(options: ScheduleOptions) -> str:
    return "--lr_scheduler_type" if options.lr_scheduler_type else "--lr_scheduler"


def _shown(options: ScheduleOptions) -> str:
    """The schedule as it was asked for."""
    return " ".join((_flag(options), options.lr_scheduler_type or options.lr_scheduler, *options.lr_scheduler_args))


def _name(given: str) -> str:
    """The name of a shape: `adafactor:1e-3` is sd-scripts' way to say adafactor and a rate that is only shown."""
    return given.lower().partition(":")[0] if given.lower().startswith("adafactor:") else given.lower()


def _shape(given: str) -> Shape:
    """The shape of a name. Raises `ValueError` for names that there are not, and for those that ask for the loss."""
    if _name(given) in ASK_FOR_LOSS:
        raise ValueError(f"--lr_scheduler {given}: follows a measured loss, which training does not give it; use cosine or rex")
    if _name(given) not in SHAPES:
        raise ValueError(f"--lr_scheduler {given}: {unknown(given, SHAPES, 'schedule')}")
    return SHAPES[_name(given)]


def _maker(options: ScheduleOptions) -> Callable[..., LRScheduler]:
    """The function or class that makes the schedule. Raises `ValueError` for one that cannot be imported, or is none."""
    if not options.lr_scheduler_type:
        module, _, attribute = _shape(options.lr_scheduler).path.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    return _class(options.lr_scheduler_type)


def _class(given: str) -> type[LRScheduler]:
    flag, own = f"--lr_scheduler_type {given}", lr_scheduler.__all__
    by_fold = {name.lower(): name for name in own}
    path = given if "." in given else f"torch.optim.lr_scheduler.{by_fold.get(given.lower(), given)}"
    module, _, attribute = path.rpartition(".")
    if attribute.lower() in ASK_FOR_LOSS:
        raise ValueError(f"{flag}: follows a measured loss, which training does not give it; use CosineAnnealingLR or --lr_scheduler rex")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        advice = f"cannot import {path} ({error})" if "." in given else unknown(given, own, "schedule of torch")
        raise ValueError(f"{flag}: {advice}") from None
    if not (isinstance(found, type) and issubclass(found, LRScheduler)):
        raise ValueError(f"{flag}: {path} is not a torch LRScheduler class")
    return found
