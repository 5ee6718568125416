"""`--reproduce lock.toml`: a run made again from its lock file, its inputs compared with those of then."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.core.options import OptionError, option
from library.core.rules import Rule
from library.core.spelling import unknown
from library.data.dataset import TrainingData
from library.models.architecture import Architecture
from library.training.adapters import NetworkOptions
from library.training.length import Length, RunOptions
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.reproduction import surroundings
from library.training.reproduction.inputs import Input
from library.training.reproduction.lock import LOCK, Lock, of_the_moment, split_options, without_secrets, write_lock
from networks.protocol import network_modules

logger = get_logger(__name__)
PROCESSES = "processes"


@dataclass(kw_only=True, frozen=True)
class ReproduceOptions:
    """Reproduction."""

    reproduce: Path | None = option(
        None, help="lock.toml of a run to be made again: with its options and seed (those given besides win), and with the same inputs"
    )
    allow_reproduce_mismatch: tuple[str, ...] = option(
        (), help="inputs of --reproduce that may be others than they were, by the names with which they are refused"
    )
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(option="allow_reproduce_mismatch", when=lambda v: v["reproduce"] is None, because="there is no --reproduce"),
    )


def keep_lock(
    arch: Architecture,
    options: OptionSet,
    data: TrainingData,
    inputs: Mapping[str, Input],
    accelerator: Accelerator,
    folder: Path,
    *,
    resumes: bool,
) -> None:
    """Compare with the run of `--reproduce`, if any, then write this run's lock file into `folder`.

    Every rank calls it, one works, with the `inputs` of `inputs_of`. Raises `OptionError` on every rank with all that differs and is not
    allowed to, and where the lock file cannot be written.
    """
    problems: list[str] = []
    if accelerator.is_main_process:
        try:
            lock = lock_of(arch, options, data, inputs, accelerator)
            problems = refusals(lock, options, folder)
            if not problems:
                write_lock(lock, folder, resumes=resumes)
        except ValueError as error:
            problems = str(error).splitlines()
    [problems] = broadcast_object_list([problems])
    if problems:
        raise OptionError(problems)


def lock_of(arch: Architecture, options: OptionSet, data: TrainingData, inputs: Mapping[str, Input], accelerator: Accelerator) -> Lock:
    """The lock of a run that is about to start, with these inputs (of `inputs_of`)."""
    differing, same = split_options(options, {"seed": data.seed})
    chosen, optimizer = options[NetworkOptions].network_module, options[OptimizerOptions].optimizer_type
    foreign = [name for name in (chosen, optimizer) if "." in name and name not in network_modules()]
    processes = accelerator.num_processes
    length = Length.of(options[RunOptions], data.batches_per_epoch(processes))
    script, *words = sys.argv
    return Lock(
        run={
            "family": arch.name,
            "seed": data.seed,
            PROCESSES: processes,
            "steps": length.steps,
            "steps_per_epoch": length.steps_per_epoch,
            **of_the_moment([Path(script).name, *without_secrets(words, options)]),
        },
        options=differing,
        defaults=same,
        versions=surroundings.versions(foreign),
        hardware=surroundings.hardware(accelerator.device),
        environment=surroundings.environment(),
        inputs=inputs,
    )


def refusals(lock: Lock, options: OptionSet, folder: Path) -> list[str]:
    """Why this run, of `lock`, does not reproduce the one of `--reproduce`; empty where it does. What may matter is logged."""
    chosen = options[ReproduceOptions]
    if chosen.reproduce is None:
        return []
    then = Lock.read(chosen.reproduce)
    problems = []
    if (folder / LOCK).exists() and chosen.reproduce.exists() and (folder / LOCK).samefile(chosen.reproduce):
        problems.append(f"--reproduce {chosen.reproduce}: this run would be written over that one; give another --output_dir")
    different = dict(input_differences(then.inputs, lock.inputs))
    if then.run.get(PROCESSES) != lock.run[PROCESSES]:
        different[PROCESSES] = f"{then.run.get(PROCESSES)} then, {lock.run[PROCESSES]} now"
    problems += _unknown_fields(chosen.allow_reproduce_mismatch, [*then.inputs, *lock.inputs, PROCESSES])
    for name, what in different.items():
        if not {name, name.partition(":")[0]} & set(chosen.allow_reproduce_mismatch):
            problems.append(f"--reproduce {chosen.reproduce}: {name} differs: {what}; --allow_reproduce_mismatch {name} takes it as it is")
    if not problems:
        _tell(then, lock, different)
    return problems


def input_differences(then: Mapping[str, Input], now: Mapping[str, Input]) -> Iterator[tuple[str, str]]:
    """The inputs that are not what they were: name, and how. Where they are does not matter."""
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        if before is None or after is None:
            gone, place = ("not there then", after) if before is None else ("not there now", before)
            yield name, f"{gone}: {place.place if place else ''}"
        elif before.digest != after.digest:
            yield name, f"{_described(before)} then, {_described(after)} now"


def plain_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: then -> now` for every entry that is not the same."""
    pairs = ((name, then.get(name), now.get(name)) for name in dict.fromkeys([*then, *now]))
    return [f"{name}: {before} -> {after}" for name, before, after in pairs if _as_toml(before) != _as_toml(after)]


def _tell(then: Lock, now: Lock, different: Mapping[str, str]) -> None:
    """Say what is not as it was."""
    for name, what in different.items():
        logger.warning("--reproduce: %s differs, which is allowed: %s", name, what)
    for what, before, after in (
        ("versions", then.versions, now.versions),
        ("hardware", then.hardware, now.hardware),
        ("environment variables", then.environment, now.environment),
    ):
        changes = plain_differences(before, after)
        if changes:
            logger.warning("--reproduce: other %s, so the numbers may differ: %s", what, "; ".join(changes))
    changes = plain_differences({**then.defaults, **then.options}, {**now.defaults, **now.options})
    logger.info("--reproduce: seed %s, %s", now.run["seed"], f"other options: {'; '.join(changes)}" if changes else "the same options")


def _described(found: Input) -> str:
    size = f"{found.bytes} bytes" if found.bytes is not None else f"{found.images} images" if found.images is not None else "text"
    return f"{found.place} ({size}, {found.digest[:8]})"


def _unknown_fields(given: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    known = {part for name in names for part in (name, name.partition(":")[0])}
    return (f"--allow_reproduce_mismatch: {unknown(name, known, 'input')}" for name in given if name not in known)


def _as_toml(value: Any) -> Any:
    """A value as a lock file gives it back."""
    if isinstance(value, list | tuple):
        return [_as_toml(item) for item in value]
    return str(value) if isinstance(value, Path) else value
