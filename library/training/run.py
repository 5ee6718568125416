"""The training run. `train` is its table of contents."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn

from library.core.command_line import OptionSet, parse_command_line
from library.core.log import get_logger
from library.data.batch import Batch
from library.data.options import DataOptions
from library.diffusion.loss import LossOptions
from library.inference.generate import Generator
from library.models.architecture import Architecture, architecture_named
from library.models.presets import presets
from library.training.adapters import NetworkOptions
from library.training.compiling import CompileOptions
from library.training.distributed import DistributedOptions
from library.training.length import RunOptions, settle_length
from library.training.memory.options import MemoryOptions
from library.training.metadata import MetadataOptions, file_metadata
from library.training.misfits import refuse_misfits, refuse_unfit_schedule
from library.training.optimizing.averaging import averaged
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.optimizing.rates import effective_rates
from library.training.optimizing.schedule import ScheduleOptions
from library.training.plan import PlanOptions, plan
from library.training.precision import PrecisionOptions
from library.training.prepare import epochs_of, load_data, make_accelerator, resolved_seed
from library.training.previews import PreviewOptions, Previews
from library.training.progress import LogOptions
from library.training.retired import IDLE, refused_options
from library.training.rules import without_effect
from library.training.save import SaveOptions, Saver
from library.training.setup import Run, check_together, set_up
from library.training.show_timesteps import TimestepViewOptions, show_timesteps
from library.training.speed import SpeedOptions
from library.training.step import acting_at, batch_loss
from library.training.validation import ValidationOptions, validate, without_pictures
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
        arch.ModelOptions, DataOptions, NetworkOptions, RunOptions, OptimizerOptions, ScheduleOptions, arch.NoiseOptions, LossOptions,
        PrecisionOptions, MemoryOptions, CompileOptions, SpeedOptions, DistributedOptions, SaveOptions, PreviewOptions, ValidationOptions,
        PlanOptions, TimestepViewOptions, LogOptions, MetadataOptions,
    ]  # fmt: skip


def main(family: str, argv: list[str]) -> None:
    """Run a family's training script with command-line arguments. Raises `ValueError` for everything the user can mend."""
    arch = architecture_named(family)
    about = f"Train a LoRA, LoHa or LoKr for {arch.title}."
    groups, script, refuse = option_groups(arch), f"{family}_train_network.py", refused_options(arch)
    options = parse_command_line(groups, argv, prog=script, about=about, refuse=refuse, idle=IDLE, presets=presets(arch))
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
    check_together(arch, options, accelerator)
    saver = Saver(options[SaveOptions], options[PrecisionOptions].adapter_dtype)
    seed = resolved_seed(options[RunOptions].seed)
    data = load_data(arch, options, seed)
    for sentence in without_pictures(options[ValidationOptions], data):
        logger.warning("%s", sentence)
    name = saver.options.output_name
    previews = Previews.of(options[PreviewOptions], arch, saver.folder, name, seed, options[arch.ModelOptions])
    run = set_up(arch, options, accelerator, data, seed, saver, previews)
    with run.progress.bar():
        if previews.due_at_first():
            preview(run, f"{run.step:06d}")
        for epoch, batches in epochs_of(data, run.length.epochs, accelerator):
            train_epoch(run, epoch, batches)
            if saver.due_after_epoch(epoch, run.length.epochs):
                save(run, saver.epoch_file(epoch), epoch)
                saver.remove_old_epochs(epoch, run.length.epochs)
            if options[ValidationOptions].due_after_epoch(epoch):
                measure_validation(run, "epoch")
            if previews.due_after_epoch(epoch):
                preview(run, f"e{epoch:06d}")
    save(run, saver.final_file(), run.length.epochs)
    accelerator.end_training()
    return RunResult(losses=run.progress.losses, file=saver.final_file())


def train_epoch(run: Run, epoch: int, batches: Iterable[Batch]) -> None:
    """One epoch, counted from 1: every batch of this rank once, or until the last step of the run."""
    run.trained.network.on_epoch_start(run.trained.models.text_encoders, run.trained.models.denoiser)
    for group in _grouped(batches, run.options[RunOptions].gradient_accumulation_steps):
        update(run, group)
        if run.saver.due_after_step(run.step) and run.step < run.length.steps:
            save(run, run.saver.step_file(run.step), epoch)
            run.saver.remove_old_steps(run.step)
        if run.options[ValidationOptions].due_after_step(run.step):
            measure_validation(run, "step")
        if run.previews.due_after_step(run.step):
            preview(run, f"{run.step:06d}")
        if run.step == run.length.steps:
            break
    run.accelerator.log(run.progress.epoch_figures(), step=run.step)


def update(run: Run, batches: list[Batch]) -> None:
    """One optimizer step over the mean loss of some batches. Raises `ValueError` before the update where the loss is not finite."""
    accelerator, total = run.accelerator, 0.0
    run.trained.network.on_step_start()
    for index, batch in enumerate(batches):
        is_last = index + 1 == len(batches)
        strength = acting_at(run.context, batch.network_multiplier)
        with _synchronised(accelerator, run.context.model, is_last), strength:
            loss = batch_loss(run.context, batch)
            total += loss.detach().item() / len(batches)
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss became {total} at step {run.step + 1} with the images {', '.join(batch.images)}; nothing was updated"
                )
            accelerator.backward(loss / len(batches))
    options = run.options[OptimizerOptions]
    if not options.fused_backward_pass:  # else the backward pass has stepped every weight
        if options.max_grad_norm > 0:
            accelerator.clip_grad_norm_(run.trained.parameters, options.max_grad_norm)
        run.optimizer.step()
    rates = effective_rates(run.optimizer, run.trained.group_names)
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    accelerator.log(run.progress.update(total, rates) | bound_norms(run), step=run.step)
    if run.step == 1:
        _tell_ways(run.trained.network)


def bound_norms(run: Run) -> dict[str, float]:
    """Keep the deltas within `--scale_weight_norms`; returns how many were shrunk and their norms, by tracker key."""
    limit = run.options[NetworkOptions].scale_weight_norms
    if limit is None:
        return {}
    shrunk, mean, largest = run.trained.network.apply_max_norm_regularization(limit, run.accelerator.device)
    return {"max_norm/keys_scaled": shrunk, "max_norm/average_key_norm": mean, "max_norm/max_key_norm": largest}


def save(run: Run, path: Path, epoch: int) -> None:
    """Write the network as it is now; one process writes, all wait."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        no_metadata = run.options[MetadataOptions].no_metadata
        entries = file_metadata(run.metadata, steps=run.step, epoch=epoch, no_metadata=no_metadata)
        with averaged(run.optimizer):
            run.trained.network.save_weights(str(path), run.saver.dtype, entries)
        logger.info("saved %s (step %d)", path, run.step)
    run.accelerator.wait_for_everyone()


def preview(run: Run, moment: str) -> None:
    """Draw the previews with the network as it is now; one process draws, all wait."""
    accelerator, context = run.accelerator, run.context
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        generator = Generator(
            arch=run.arch, models=run.trained.models, model_options=context.model_options, device=accelerator.device, dtype=torch.float32
        )
        with accelerator.autocast(), averaged(run.optimizer):
            run.previews.draw(generator, run.trained.network, moment, text_is_fixed=not run.trained.trains_text_encoders)
    accelerator.wait_for_everyone()


def measure_validation(run: Run, moment: Literal["step", "epoch"]) -> None:
    """Log the loss on the images that are held out, where there are any; `moment` is what ended."""
    if run.data.validation is not None:
        most = run.options[ValidationOptions].max_validation_steps
        with averaged(run.optimizer):
            figures = validate(run.context, run.data.validation, run.accelerator, moment, most=most)
        run.accelerator.log(figures, step=run.step)


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


def _synchronised(accelerator: Accelerator, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Gradients go from rank to rank with the last batch of a step only."""
    return nullcontext() if is_last else accelerator.no_sync(model)


def _tell_ways(network: TrainableNetwork) -> None:
    """Say how the deltas were computed, which is known once there was an input."""
    ways = ", ".join(f"{way} {count}" for way, count in sorted(network.ways_taken().items()))
    if ways:
        logger.info("ways to the deltas, and of how many layers: %s", ways)
