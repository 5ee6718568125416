"""Setting a run up: what cannot work is refused, then models, caches, network, optimizer and schedule are made, in this order."""

from dataclasses import dataclass, field
from functools import partial

from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.data.dataset import TrainingData
from library.data.metadata import dataset_metadata
from library.diffusion.loss import LossOptions
from library.models.architecture import Architecture
from library.models.attention import refuse_attention
from library.training.adapters import NetworkOptions, TrainedNetwork, build_trained_network, check_network_arguments, merge_base_weights
from library.training.caching import fill_caches, release_models
from library.training.compiling import CompileOptions, compile_blocks, refuse_compilation
from library.training.distributed import DistributedOptions
from library.training.length import Length, RunOptions, settle_length
from library.training.memory.block_swap import BlockSwap
from library.training.memory.budget import widest_activations
from library.training.memory.checkpointing import set_checkpointing
from library.training.memory.options import MemoryOptions, refuse_without_blocks
from library.training.metadata import Facts, run_metadata
from library.training.misfits import refuse_misfits, refuse_unfit_schedule
from library.training.model import TrainingModel
from library.training.optimizing.fused_backward import fuse_backward
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer, optimizer_arguments, optimizer_class
from library.training.optimizing.schedule import ScheduleOptions, build_schedule
from library.training.precision import PrecisionOptions, narrow_adapters, store_base
from library.training.prepare import load_models, tell_cut_captions
from library.training.previews import Previews
from library.training.progress import Progress
from library.training.rules import without_effect
from library.training.save import Saver
from library.training.speed import SpeedOptions, set_backend_switches
from library.training.step import StepContext

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Run:
    """A run that is set up: what the loop moves forward."""

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


def check_together(arch: Architecture, options: OptionSet, accelerator: Accelerator) -> None:
    """Say what has no effect, and raise `ValueError` for what cannot work together, on this device, or with this family."""
    for sentence in (*without_effect(options), *options[DistributedOptions].in_vain(accelerator.num_processes)):
        logger.warning("%s", sentence)
    check_network_arguments(arch, options[NetworkOptions])
    refuse_without_blocks(arch, options[MemoryOptions], options[arch.ModelOptions])
    refuse_attention(options[arch.ModelOptions], accelerator.device, options[PrecisionOptions].weight_dtype)
    refuse_compilation(arch, options, accelerator.device)
    refuse_misfits(options, accelerator.num_processes)


def set_up(
    arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData, seed: int, saver: Saver, previews: Previews
) -> Run:
    """Load the models, fill the caches, make the network, and build what trains it."""
    set_backend_switches(options[SpeedOptions])
    length = settle_length(options[RunOptions], data, accelerator.num_processes)
    refuse_unfit_schedule(options, length.steps)
    trained = adapted_models(arch, options, accelerator, data)
    model = trainable_model(arch, options, accelerator, data, trained)
    optimizer = build_optimizer(trained.groups, options[OptimizerOptions], seed=seed)
    schedule = build_schedule(optimizer, options[ScheduleOptions], length.steps)
    swaps = options[MemoryOptions].blocks_to_swap
    if swaps:
        BlockSwap(arch.blocks(model.denoiser), swaps, accelerator.device).place(model)
    prepared, optimizer = accelerator.prepare(model, optimizer, device_placement=[not swaps, True])
    if options[OptimizerOptions].fused_backward_pass:
        fuse_backward(optimizer, options[OptimizerOptions].max_grad_norm)
    context = StepContext(
        arch=arch, process=arch.noise_process(options[arch.NoiseOptions], options[arch.ModelOptions]), model=prepared,
        vae=trained.models.vae, tokenizers=trained.models.tokenizers, model_options=options[arch.ModelOptions],
        loss=options[LossOptions], seed=seed, device=accelerator.device,
    )  # fmt: skip
    run = Run(
        accelerator=accelerator, arch=arch, options=options, data=data, context=context, trained=trained, optimizer=optimizer,
        schedule=schedule, length=length, saver=saver, previews=previews,
        progress=Progress(length.steps, length.steps_per_epoch, accelerator.is_local_main_process),
    )  # fmt: skip
    run.metadata = describe(run, seed)
    _announce(run)
    return run


def adapted_models(arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData) -> TrainedNetwork:
    """The models with the network on them, their caches filled; what nothing needs any more is freed."""
    models = load_models(arch, options, accelerator.device)
    tell_cut_captions(arch, models, data, options[arch.ModelOptions])
    merge_base_weights(models, options[NetworkOptions])
    fill_caches(arch, models, data, options, accelerator)
    store_base(models.denoiser, options[PrecisionOptions], accelerator.device)
    trained = build_trained_network(models, options[NetworkOptions], options[OptimizerOptions], text_is_cached=data.has_cached_text)
    narrow_adapters(trained.network, options[PrecisionOptions])
    release_models(models, options)
    return trained


def trainable_model(
    arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData, trained: TrainedNetwork
) -> TrainingModel:
    """Base and network as one module, its blocks under checkpoints and compiled where that is asked for."""
    models = trained.models
    encoders = [] if data.has_cached_text else models.text_encoders
    model = TrainingModel(arch, models.denoiser, encoders, trained.network, trains_text_encoders=trained.trains_text_encoders)
    dtype = options[PrecisionOptions].weight_dtype
    measure = partial(widest_activations, model, data, models.tokenizers, options[arch.ModelOptions], dtype)
    set_checkpointing(model, options[MemoryOptions], accelerator.device, measure)
    compile_blocks(arch, models.denoiser, options[CompileOptions], data)
    return model


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


def _announce(run: Run) -> None:
    logger.info("%s: %d steps; an epoch has %d; %d epochs", run.arch.title, run.length.steps, run.length.steps_per_epoch, run.length.epochs)
    logger.info("writing %s", run.saver.final_file())
