"""The training run. `train` is its table of contents."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from library.core.command_line import OptionSet, parse_command_line
from library.core.log import get_logger
from library.core.secrets import hidden
from library.data.batch import Batch
from library.data.options import DataOptions
from library.diffusion.loss import LossOptions
from library.models.architecture import Architecture, architecture_named
from library.models.presets import presets
from library.training.adapters import NetworkOptions
from library.training.compiling import CompileOptions
from library.training.distributed import DistributedOptions
from library.training.hub import HubOptions
from library.training.length import RunOptions, settle_length
from library.training.memory.options import MemoryOptions
from library.training.metadata import MetadataOptions
from library.training.misfits import refuse_misfits, refuse_unfit_schedule
from library.training.moments import after_epoch, after_step, keep_interrupted, look, preview, record, save
from library.training.optimizing.average import AverageOptions
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.optimizing.schedule import ScheduleOptions
from library.training.parallel.team import Team
from library.training.plan import PlanOptions, plan
from library.training.precision import PrecisionOptions
from library.training.preflight import preflight
from library.training.prepare import epochs_of, load_data, make_accelerator, resolved_seed
from library.training.previews import PreviewOptions
from library.training.reproduction.reproduce import ReproduceOptions
from library.training.retired import refused_options
from library.training.rules import without_effect
from library.training.save import SaveOptions
from library.training.setup import Run, set_up
from library.training.show_timesteps import TimestepViewOptions, show_timesteps
from library.training.speed import SpeedOptions, chance_named
from library.training.state.options import StateOptions
from library.training.state.resuming import resume
from library.training.tracking.options import LogOptions
from library.training.tracking.trackers import finish_trackers
from library.training.update import FaultOptions, NonFinite, update
from library.training.validation import ValidationOptions
from networks.protocol import TrainableNetwork

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves: the loss of every optimizer step, and the final file."""

    losses: list[float]
    file: Path


def option_groups(arch: Architecture) -> list[type]:
    """The option groups of a family's training script, in the order of its help."""
    return [
        arch.ModelOptions, DataOptions, NetworkOptions, RunOptions, OptimizerOptions, AverageOptions, ScheduleOptions, arch.NoiseOptions,
        LossOptions, FaultOptions, PrecisionOptions, MemoryOptions, CompileOptions, SpeedOptions, DistributedOptions, SaveOptions,
        StateOptions, PreviewOptions, ValidationOptions, PlanOptions, TimestepViewOptions, LogOptions, MetadataOptions, HubOptions,
        ReproduceOptions,
    ]  # fmt: skip


def main(family: str, argv: list[str]) -> None:
    """Run a family's training script with command-line arguments. Raises `ValueError` for everything the user can mend."""
    arch = architecture_named(family)
    about = f"Train a LoRA, LoHa or LoKr for {arch.title}."
    groups, script, refuse = option_groups(arch), f"{family}_train_network.py", refused_options(arch)
    options = parse_command_line(groups, argv, prog=script, about=about, refuse=refuse, presets=presets(arch), family=family)
    if options[TimestepViewOptions].is_asked:
        show_only(arch, options)
    elif options[PlanOptions].is_asked:
        plan_only(arch, options)
    else:
        train(arch, options)


def show_only(arch: Architecture, options: OptionSet) -> None:
    """Show the timesteps that `train` would draw, from the same options; one process does."""
    if _only_process(options).is_main_process:
        for sentence in without_effect(options):
            logger.warning("%s", sentence)
        show_timesteps(arch, options)


def plan_only(arch: Architecture, options: OptionSet) -> None:
    """Say what `train` would see, from the same options and data; one process does."""
    state = _only_process(options)
    seed = resolved_seed(options[RunOptions].seed)
    if state.is_main_process:
        data = load_data(arch, options, seed)
        refuse_misfits(options, state.num_processes)
        length = settle_length(options[RunOptions], data, state.num_processes)
        refuse_unfit_schedule(options, length.steps)
        known = {"steps_per_epoch": length.steps_per_epoch, "steps": length.steps, "processes": state.num_processes}
        plan(arch, options, data, run=known, folder=Path(options[SaveOptions].output_dir))


def train(arch: Architecture, options: OptionSet) -> RunResult:
    """Train a network and save it. Checks everything that can be checked before the models are loaded."""
    accelerator = make_accelerator(options)
    options[LogOptions].set_up(is_main=accelerator.is_main_process)
    team = Team.of(accelerator)
    with team.together(), ExitStack() as at_the_end:
        at_the_end.callback(finish_trackers, accelerator)
        ready = preflight(arch, options, accelerator, team)
        at_the_end.enter_context(ready.uploads or nullcontext())
        run = set_up(ready)
        with run.progress.bar(), run.interruption.heard(), chance_named(), end_logged(run):
            begin(run)
            for epoch, batches in epochs_of(run.data, run.length.epochs, accelerator, run.epoch, run.taken):
                run.epoch = epoch
                train_epoch(run, batches)
                after_epoch(run)
                run.taken = 0
    return RunResult(losses=run.progress.losses, file=run.saver.final_file())


@contextmanager
def end_logged(run: Run) -> Iterator[None]:
    """Say in the log how a run ends that does not reach its last step, and close it."""
    try:
        yield
    except BaseException as error:
        is_asked = isinstance(error, SystemExit | KeyboardInterrupt)
        run.log.event("stopped", run.step, run.epoch, reason="interrupted" if is_asked else hidden(str(error)) or type(error).__name__)
        raise
    finally:
        run.log.close()


def begin(run: Run) -> None:
    """Go on from the state that `--resume` names, looking first at the moment where it stands; without one, at the start."""
    stands = resume(run, run.states)
    if run.states.standing is not None:
        run.log.event("resumed", run.step, run.epoch, state=run.states.standing.folder.name)
    if run.step >= run.length.steps and not run.saver.final_file().exists():
        save(run, run.saver.final_file())
    if stands is not None:
        look(run, stands)
    elif run.step == 0 and run.previews.due_at_first():
        preview(run, f"{run.step:06d}")
    if stands == "epoch":
        run.epoch, run.taken = run.epoch + 1, 0
    made = math.ceil(run.taken / run.options[RunOptions].gradient_accumulation_steps)
    run.length = run.length.seen_from(run.step, run.epoch, made)


def train_epoch(run: Run, batches: Iterable[Batch]) -> None:
    """The rest of an epoch: every batch of this rank once, or until the last step of the run."""
    run.trained.network.on_epoch_start(run.trained.models.text_encoders, run.trained.models.denoiser)
    batches = batches if run.step < run.length.steps else ()  # the state of a finished run stands there
    for group in _grouped(run.instruments.timed(batches), run.options[RunOptions].gradient_accumulation_steps):
        try:
            figures = update(run, group)
        except NonFinite:
            keep_interrupted(run)
            raise
        run.taken += len(group)
        record(run, figures)
        if run.step == 1:
            _tell_ways(run.trained.network)
        after_step(run)
        if run.step == run.length.steps:
            break


# Small parts


def _only_process(options: OptionSet) -> PartialState:
    """The processes there are, as the `Accelerator` of a run would find them, with logging set up."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    options[LogOptions].set_up(is_main=state.is_main_process)
    return state


def _grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _tell_ways(network: TrainableNetwork) -> None:
    """Say how the deltas were computed, which is known once there was an input."""
    ways = ", ".join(f"{way} {count}" for way, count in sorted(network.ways_taken().items()))
    if ways:
        logger.info("ways to the deltas, and of how many layers: %s", ways)
