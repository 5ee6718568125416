"""Before the models are loaded: everything that a run needs is read, and what cannot work is refused."""

import hashlib

from accelerate import Accelerator

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.core.options import declared
from library.data.dataset import TrainingData
from library.diffusion.loss import LossOptions
from library.models.architecture import Architecture
from library.models.attention import refuse_attention
from library.training.adapters import NetworkOptions, check_network_arguments
from library.training.compiling import refuse_compilation
from library.training.distributed import DistributedOptions
from library.training.hub import HubOptions, fetch_state, uploader_of_run
from library.training.length import RunOptions, settle_length
from library.training.memory.options import MemoryOptions, refuse_without_blocks
from library.training.misfits import refuse_misfits, refuse_unfit_schedule
from library.training.optimizing.average import AverageOptions
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.optimizing.schedule import ScheduleOptions
from library.training.parallel.choice import engine_of, refuse_data, refuse_engine
from library.training.parallel.engine import Engine
from library.training.parallel.team import Team
from library.training.precision import PrecisionOptions
from library.training.prepare import load_data, resolved_seed
from library.training.previews import PreviewOptions, Previews
from library.training.reproduction.inputs import inputs_of
from library.training.reproduction.reproduce import keep_lock
from library.training.rules import without_effect
from library.training.save import SaveOptions, Saver
from library.training.setup import Preflight
from library.training.speed import refuse_chance
from library.training.state.options import StateOptions
from library.training.state.resuming import check_resumable
from library.training.state.states import States
from library.training.update import FaultOptions
from library.training.validation import ValidationOptions, without_pictures

logger = get_logger(__name__)

OWN_PLACES = ("output_dir", "network_weights", "base_weights", "sample_prompts", "resume", "seed")
"""Options that may differ from machine to machine: paths, and the seed, which the first rank tells the others."""


def check_together(arch: Architecture, options: OptionSet, accelerator: Accelerator, engine: Engine) -> None:
    """Say what has no effect, and raise `ValueError` for what cannot work together, on this device, or with this family."""
    for sentence in (
        *without_effect(options),
        *options[DistributedOptions].in_vain(accelerator.num_processes),
        *options[AverageOptions].remarks(options[NetworkOptions].scale_weight_norms),
    ):
        logger.warning("%s", sentence)
    check_network_arguments(arch, options[NetworkOptions])
    refuse_without_blocks(arch, options[MemoryOptions], options[arch.ModelOptions])
    refuse_attention(options[arch.ModelOptions], accelerator.device, options[PrecisionOptions].weight_dtype)
    refuse_compilation(arch, options, accelerator.device)
    refuse_chance(options, options[arch.ModelOptions])
    refuse_misfits(options, accelerator.num_processes)
    refuse_engine(engine, arch, options)


def refuse_differences(team: Team, arch: Architecture, options: OptionSet, data: TrainingData, saver: Saver) -> None:
    """Raise `ValueError` on every rank where one sees other options or data than the first, or not its states."""
    groups = (
        NetworkOptions, RunOptions, OptimizerOptions, AverageOptions, ScheduleOptions, arch.NoiseOptions, LossOptions, FaultOptions,
        PrecisionOptions, MemoryOptions, SaveOptions, StateOptions, PreviewOptions, ValidationOptions,
    )  # fmt: skip
    named = {entry.name: getattr(options[group], entry.name) for group in groups for entry in declared(group)}
    team.agree("the options", {f"--{name}": str(value) for name, value in named.items() if name not in OWN_PLACES})
    images = hashlib.sha256("\n".join(f"{image.path.name}\t{image.placement.bucket}\t{image.caption}" for image in data.images).encode())
    team.agree("the data", {"batches in an epoch": str(data.batches_per_epoch()), "images and captions": images.hexdigest()[:16]})
    if options[StateOptions].saves and (blind := team.blind_to(saver.folder)):
        ranks = ", ".join(map(str, blind))
        raise ValueError(
            f"--save_state: ranks {ranks} do not see --output_dir {saver.folder}; it must be on a disk that all machines share"
        )


def preflight(arch: Architecture, options: OptionSet, accelerator: Accelerator, team: Team) -> Preflight:
    """Read the data and what the run goes on from. Raises `ValueError` for all that can be refused without the models."""
    engine = engine_of(accelerator, options)
    check_together(arch, options, accelerator, engine)
    saver = Saver(options[SaveOptions], options[PrecisionOptions].adapter_dtype)
    hub, resume = options[HubOptions], options[StateOptions].resume
    fetched = fetch_state(hub, resume, saver.folder) if hub.resume_from_huggingface and resume else None
    standing = check_resumable(options, saver, accelerator, fetched)
    seed = resolved_seed(options[RunOptions].seed, standing.seed if standing else None)
    data = load_data(arch, options, seed)
    refuse_data(engine, data)
    refuse_differences(team, arch, options, data, saver)
    for sentence in without_pictures(options[ValidationOptions], data):
        logger.warning("%s", sentence)
    length = settle_length(options[RunOptions], data, accelerator.num_processes)
    refuse_unfit_schedule(options, length.steps)
    inputs = inputs_of(arch, options, data) if accelerator.is_main_process else {}
    states = States.of(arch, options, data, seed, saver, accelerator, standing, inputs)
    previews = Previews.of(options[PreviewOptions], arch, saver.folder, saver.options.output_name, seed, options[arch.ModelOptions])
    uploads = uploader_of_run(hub, accelerator)
    keep_lock(arch, options, data, inputs, accelerator, saver.run_folder, resumes=standing is not None)
    return Preflight(
        arch=arch, options=options, accelerator=accelerator, engine=engine, team=team, data=data, seed=seed, length=length, saver=saver,
        states=states, previews=previews, uploads=uploads,
    )  # fmt: skip
