"""Setting a run up, in this order: models, caches, network, optimizer, schedule. `preflight.py` has refused what cannot work."""

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
from library.training.adapters import NetworkOptions, TrainedNetwork, build_trained_network, merge_base_weights
from library.training.caching import fill_caches, release_models
from library.training.compiling import CompileOptions, compile_blocks
from library.training.hub import Uploader
from library.training.interruption import Interruption
from library.training.length import Length
from library.training.memory.block_swap import BlockSwap
from library.training.memory.budget import widest_activations
from library.training.memory.checkpointing import set_checkpointing
from library.training.memory.options import MemoryOptions
from library.training.metadata import Facts, run_metadata
from library.training.model import TrainingModel
from library.training.optimizing.average import AverageOptions, WeightAverage
from library.training.optimizing.fused_backward import GradientFaults, fuse_backward
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer, optimizer_arguments, optimizer_class
from library.training.optimizing.schedule import ScheduleOptions, build_schedule
from library.training.parallel.engine import Engine
from library.training.parallel.team import Team
from library.training.precision import PrecisionOptions, narrow_adapters, store_base
from library.training.prepare import load_models, tell_cut_captions
from library.training.previews import Previews
from library.training.progress import Progress
from library.training.save import Saver
from library.training.speed import SpeedOptions, set_backend_switches
from library.training.state.states import States
from library.training.step import StepContext
from library.training.tracking.instruments import Instruments
from library.training.tracking.options import LogOptions
from library.training.tracking.run_log import RunLog

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
    engine: Engine
    team: Team
    saver: Saver
    states: States
    previews: Previews
    progress: Progress
    instruments: Instruments
    log: RunLog
    uploads: Uploader | None = None
    average: WeightAverage | None = None
    fused: GradientFaults | None = None  # of a fused backward pass
    interruption: Interruption = field(default_factory=Interruption)
    metadata: dict[str, str] = field(default_factory=dict)
    step: int = 0  # optimizer steps made
    epoch: int = 1  # the one in progress, or that just ended
    taken: int = 0  # its batches that this rank has trained on
    skipped: int = 0  # steps in a row that were left out


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a run will do, read and found possible before the models are loaded (`preflight.py`)."""

    arch: Architecture
    options: OptionSet
    accelerator: Accelerator
    engine: Engine
    team: Team
    data: TrainingData
    seed: int
    length: Length
    saver: Saver
    states: States
    previews: Previews
    uploads: Uploader | None


def set_up(ready: Preflight) -> Run:
    """Load the models, fill the caches, make the network, and build what trains it."""
    arch, options, accelerator, data, length = ready.arch, ready.options, ready.accelerator, ready.data, ready.length
    set_backend_switches(options[SpeedOptions])
    trained = adapted_models(ready)
    model = trainable_model(arch, options, accelerator, data, trained)
    instruments = Instruments.of(options[LogOptions], accelerator, arch, trained, length)
    optimizer = build_optimizer(trained.groups, options[OptimizerOptions], seed=ready.seed)
    schedule = build_schedule(optimizer, options[ScheduleOptions], length.steps)
    swaps = options[MemoryOptions].blocks_to_swap
    if swaps:
        BlockSwap(arch.blocks(model.denoiser), swaps, accelerator.device).place(model)
    prepared, optimizer = ready.engine.prepare(arch, model, optimizer, is_placed=bool(swaps))
    is_fused, limit = options[OptimizerOptions].fused_backward_pass, options[OptimizerOptions].max_grad_norm
    fused = fuse_backward(optimizer, limit) if is_fused else None
    context = StepContext(
        arch=arch, process=arch.noise_process(options[arch.NoiseOptions], options[arch.ModelOptions]), model=prepared,
        vae=trained.models.vae, tokenizers=trained.models.tokenizers, model_options=options[arch.ModelOptions],
        loss=options[LossOptions], seed=ready.seed, device=accelerator.device,
    )  # fmt: skip
    run = Run(
        accelerator=accelerator, arch=arch, options=options, data=data, context=context, trained=trained, optimizer=optimizer,
        schedule=schedule, length=length, engine=ready.engine, team=ready.team, saver=ready.saver, states=ready.states,
        previews=ready.previews, uploads=ready.uploads, instruments=instruments, fused=fused,
        interruption=Interruption(accelerator.num_processes),
        average=WeightAverage.of(options[AverageOptions], trained.parameters),
        log=RunLog.open(ready.saver.run_folder, accelerator.is_main_process),
        progress=Progress(length.steps, length.steps_per_epoch, accelerator.is_local_main_process),
    )  # fmt: skip
    run.metadata = describe(run, ready.seed)
    _announce(run)
    return run


def adapted_models(ready: Preflight) -> TrainedNetwork:
    """The models with the network on them, their caches filled; what nothing needs any more is freed."""
    arch, options, accelerator, data = ready.arch, ready.options, ready.accelerator, ready.data
    models = load_models(arch, options, accelerator.device, denoiser_waits=ready.engine.loads_on_cpu)
    tell_cut_captions(arch, models, data, options[arch.ModelOptions])
    merge_base_weights(models, options[NetworkOptions])
    fill_caches(arch, models, data, options, accelerator)
    ready.team.meet("the caches are filled")
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
