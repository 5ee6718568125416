"""The training run. `train` is its table of contents."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.core.command_line import OptionSet, parse_command_line
from library.core.fp8 import store_as_fp8
from library.core.log import get_logger, set_up_logging
from library.data.batch import Batch
from library.data.dataset import TrainingData
from library.data.metadata import dataset_metadata
from library.data.options import DataOptions
from library.diffusion.loss import LossOptions
from library.inference.generate import Generator
from library.models.architecture import Architecture, architecture_named
from library.training.adapters import NetworkOptions, TrainedNetwork, build_trained_network, check_network_arguments, merge_base_weights
from library.training.block_swap import BlockSwap
from library.training.caching import fill_caches
from library.training.length import Length, RunOptions, settle_length
from library.training.metadata import Facts, MetadataOptions, file_metadata, run_metadata
from library.training.model import TrainingModel
from library.training.not_yet import NOT_YET
from library.training.optimizer import OptimizerOptions, build_optimizer, optimizer_arguments, optimizer_class
from library.training.plan import PlanOptions, plan
from library.training.precision import PrecisionOptions, checkpoint_gradients
from library.training.prepare import epochs_of, load_data, load_models, make_accelerator, resolved_seed, tell_cut_captions
from library.training.previews import PreviewOptions, Previews
from library.training.progress import LogOptions, Progress
from library.training.rules import without_effect
from library.training.save import SaveOptions, Saver
from library.training.schedule import ScheduleOptions, build_schedule
from library.training.step import StepContext, acting_at, batch_loss
from library.training.validation import ValidationOptions, validate, without_pictures
from networks.protocol import TrainableNetwork

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Run:
    """A run that is set up: what the loop below moves forward."""

    accelerator: Accelerator
    arch: Architecture
    options: OptionSet
    data: TrainingData
    context: StepContext
    trained: TrainedNetwork
    optimizer: Optimizer
    schedule: LRScheduler
    length: Length
    saver: Saver
    previews: Previews
    progress: Progress
    metadata: dict[str, str] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves: the loss of every optimizer step, and the final file."""

    losses: list[float]
    file: Path


def option_groups(arch: Architecture) -> list[type]:
    """The option groups of a family's training script, in the order of its help."""
    return [
        arch.ModelOptions, DataOptions, NetworkOptions, RunOptions, OptimizerOptions, ScheduleOptions, arch.NoiseOptions, LossOptions,
        PrecisionOptions, SaveOptions, PreviewOptions, ValidationOptions, PlanOptions, LogOptions, MetadataOptions,
    ]  # fmt: skip


def main(family: str, argv: list[str]) -> None:
    """Run a family's training script with command-line arguments. Raises `ValueError` for everything the user can mend."""
    arch = architecture_named(family)
    about = f"Train a LoRA, LoHa or LoKr for {arch.title}."
    script, refused = f"{family}_train_network.py", {**NOT_YET, **arch.refused}
    options = parse_command_line(option_groups(arch), argv, prog=script, about=about, refuse=refused)
    if options[PlanOptions].is_asked:
        plan_only(arch, options)
    else:
        train(arch, options)


def plan_only(arch: Architecture, options: OptionSet) -> None:
    """Say what `train` would see, from the same options and data; one process does."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as the `Accelerator` of a run would find it
    set_up_logging(options[LogOptions].console_log_level, options[LogOptions].console_log_file, state.is_main_process)
    seed = resolved_seed(options[RunOptions].seed)
    if state.is_main_process:
        data = load_data(arch, options, seed)
        length = settle_length(options[RunOptions], data, state.num_processes)
        known = {"steps_per_epoch": length.steps_per_epoch, "steps": length.steps, "processes": state.num_processes}
        plan(arch, options, data, run=known, folder=Path(options[SaveOptions].output_dir))


def train(arch: Architecture, options: OptionSet) -> RunResult:
    """Train a network and save it. Checks everything that can be checked before the models are loaded."""
    accelerator = make_accelerator(options)
    set_up_logging(options[LogOptions].console_log_level, options[LogOptions].console_log_file, accelerator.is_main_process)
    for sentence in without_effect(options):
        logger.warning("%s", sentence)
    check_network_arguments(arch, options[NetworkOptions])
    if options[PrecisionOptions].blocks_to_swap and not arch.has_blocks:
        raise ValueError(f"--blocks_to_swap: the denoiser of {arch.title} has no row of blocks that could be swapped; leave it out")
    saver = Saver(options[SaveOptions])
    seed = resolved_seed(options[RunOptions].seed)
    data = load_data(arch, options, seed)
    for sentence in without_pictures(options[ValidationOptions], data):
        logger.warning("%s", sentence)
    previews = Previews.of(options[PreviewOptions], arch, saver.folder, saver.options.output_name, seed)
    run = set_up(arch, options, accelerator, data, seed, saver, previews)
    with run.progress.bar():
        if previews.due_at_first():
            preview(run, f"{run.step:06d}")
        for epoch, batches in epochs_of(data, run.length.epochs, accelerator):
            train_epoch(run, epoch, batches)
            if saver.due_after_epoch(epoch, run.length.epochs):
                save(run, saver.epoch_file(epoch), epoch)
                saver.remove_old_epochs(epoch)
            if options[ValidationOptions].due_after_epoch(epoch):
                measure_validation(run, "epoch")
            if previews.due_after_epoch(epoch):
                preview(run, f"e{epoch:06d}")
    save(run, saver.final_file(), run.length.epochs)
    accelerator.end_training()
    return RunResult(losses=run.progress.losses, file=saver.final_file())


def set_up(
    arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData, seed: int, saver: Saver, previews: Previews
) -> Run:
    """Load the models, fill the caches, build network, optimizer and schedule."""
    precision = options[PrecisionOptions]
    model_options = options[arch.ModelOptions]
    length = settle_length(options[RunOptions], data, accelerator.num_processes)
    models = load_models(arch, options, accelerator.device)
    tell_cut_captions(arch, models, data, model_options)
    merge_base_weights(models, options[NetworkOptions])
    fill_caches(arch, models, data, options, accelerator)
    if precision.fp8_base:  # before the network is made: DoRA measures the weights it will train on
        logger.info("fp8: the weights of %d layers of the denoiser are stored as float8_e4m3fn", store_as_fp8(models.denoiser))
    trained = build_trained_network(models, options[NetworkOptions], options[OptimizerOptions], text_is_cached=data.has_cached_text)
    if precision.gradient_checkpointing:
        checkpoint_gradients(models.denoiser, models.text_encoders if trained.trains_text_encoders else [])
    encoders = [] if data.has_cached_text else models.text_encoders
    model = TrainingModel(arch, models.denoiser, encoders, trained.network, trains_text_encoders=trained.trains_text_encoders)
    optimizer = build_optimizer(trained.groups, options[OptimizerOptions])
    schedule = build_schedule(optimizer, options[ScheduleOptions], length.steps)
    if precision.blocks_to_swap:
        BlockSwap(arch.blocks(models.denoiser), precision.blocks_to_swap, accelerator.device).place(model)
    prepared, optimizer = accelerator.prepare(model, optimizer, device_placement=[not precision.blocks_to_swap, True])
    context = StepContext(
        arch=arch, process=arch.noise_process(options[arch.NoiseOptions]), model=prepared, vae=models.vae, tokenizers=models.tokenizers,
        model_options=model_options, loss=options[LossOptions], seed=seed, device=accelerator.device,
    )  # fmt: skip
    run = Run(
        accelerator=accelerator, arch=arch, options=options, data=data, context=context, trained=trained, optimizer=optimizer,
        schedule=schedule, length=length, saver=saver, previews=previews,
        progress=Progress(length.steps, length.steps_per_epoch, accelerator.is_local_main_process),
    )  # fmt: skip
    run.metadata = describe(run, seed)
    _announce(run)
    return run


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
    clip = run.options[OptimizerOptions].max_grad_norm
    if clip > 0:
        accelerator.clip_grad_norm_(run.trained.parameters, clip)
    run.optimizer.step()
    rates = dict(zip(run.trained.group_names, map(float, run.schedule.get_last_lr()), strict=True))
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
        with accelerator.autocast():
            run.previews.draw(generator, run.trained.network, moment, text_is_fixed=not run.trained.trains_text_encoders)
    accelerator.wait_for_everyone()


def measure_validation(run: Run, moment: Literal["step", "epoch"]) -> None:
    """Log the loss on the images that are held out, where there are any; `moment` is what ended."""
    if run.data.validation is not None:
        most = run.options[ValidationOptions].max_validation_steps
        run.accelerator.log(validate(run.context, run.data.validation, run.accelerator, moment, most=most), step=run.step)


def describe(run: Run, seed: int) -> dict[str, str]:
    """The metadata that all files of this run share."""
    options = run.options[OptimizerOptions]
    return run_metadata(
        Facts(
            arch=run.arch,
            process=run.context.process,
            options=run.options,
            seed=seed,
            network=run.options[NetworkOptions],
            optimizer=run.optimizer,
            optimizer_arguments=optimizer_arguments(optimizer_class(options.optimizer_type), options.optimizer_args),
            total_steps=run.length.steps,
            epochs=run.length.epochs,
            batches_per_epoch=run.data.batches_per_epoch(run.accelerator.num_processes),
            model_entries=run.arch.metadata(run.options[run.arch.ModelOptions]),
            data_entries=dataset_metadata(run.data),
            resolution=run.data.resolution,
        )
    )


# The loop's small parts


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


def _announce(run: Run) -> None:
    logger.info("%s: %d steps; an epoch has %d; %d epochs", run.arch.title, run.length.steps, run.length.steps_per_epoch, run.length.epochs)
    logger.info("writing %s", run.saver.final_file())
