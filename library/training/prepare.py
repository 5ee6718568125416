"""Before the first step: accelerator, seed, training data and caches."""

import random
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from library.core.command_line import OptionSet
from library.core.file_hash import sampled_file_hash
from library.core.log import get_logger
from library.core.options import OptionError
from library.data.batch import Batch, TextStates
from library.data.caches import fill_latents, fill_text
from library.data.dataset import TrainingData, build_training_data
from library.data.loader import batch_loader, worker_count
from library.data.options import DataOptions
from library.models.architecture import Architecture, Models
from library.training.adapters import NetworkOptions
from library.training.precision import PrecisionOptions, refuse_what_the_device_cannot
from library.training.progress import LogOptions

logger = get_logger(__name__)


def make_accelerator(options: OptionSet) -> Accelerator:
    """Accelerate's engine for this run, with its trackers ready. Raises `ValueError` for what the device cannot do."""
    log = options[LogOptions]
    project_dir = log.project_dir()
    accelerator = Accelerator(
        mixed_precision=options[PrecisionOptions].mixed_precision,
        log_with=None if project_dir is None else log.log_with or "tensorboard",
        project_dir=project_dir,
        # a network may hold adapters that never get a gradient: a family need not use the last layers of its text encoders
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    refuse_what_the_device_cannot(options[PrecisionOptions], accelerator.device)
    if project_dir is not None:
        accelerator.init_trackers(log.log_tracker_name or "network_train")
    return accelerator


def resolved_seed(seed: int | None) -> int:
    """The seed of the run, drawn from the system and logged where the user gave none."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
        logger.info("seed %d (give --seed %d to repeat this run)", seed, seed)
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


def load_data(arch: Architecture, options: OptionSet, seed: int) -> TrainingData:
    """Read the dataset file and folders. Raises `ValueError` with everything wrong in them, and for caches that cannot be used."""
    data = options[DataOptions]
    network = options[NetworkOptions]
    if data.caches_text and not network.network_train_unet_only:
        raise OptionError(["--cache_text_encoder_outputs: cached text cannot train text encoders; add --network_train_unet_only"])
    return build_training_data(data, seed=seed, resolution_step=arch.resolution_step, default_resolution=arch.default_resolution)


def load_models(arch: Architecture, options: OptionSet, device: torch.device) -> Models:
    """The models on the device; a denoiser whose blocks are swapped waits in main memory until `BlockSwap.place`."""
    precision = options[PrecisionOptions]
    swaps = precision.blocks_to_swap > 0
    first = torch.device("cpu") if swaps else device
    models = arch.load(options[arch.ModelOptions], device=first, dtype=precision.weight_dtype)
    for module in [*models.text_encoders, models.vae] if swaps else []:
        if module is not None:
            module.to(device)
    return models


def tell_cut_captions(arch: Architecture, models: Models, data: TrainingData, model_options: Any) -> None:
    """Warn, once and with their number, of captions that are longer than the text encoders read."""
    captions = [max(image.caption.split("\n"), key=len) for image in data.images]
    over = arch.overlong(models.tokenizers, captions, model_options) if captions else []
    cut = sum(length > 0 for length in over)
    if cut:
        longest = max(range(len(over)), key=over.__getitem__)
        logger.warning(
            "%d of %d captions are longer than the text encoder reads and will be cut, the longest by %d tokens (%s)",
            cut, len(captions), over[longest], data.images[longest].path,
        )  # fmt: skip


def fill_caches(arch: Architecture, models: Models, data: TrainingData, options: OptionSet, accelerator: Accelerator) -> None:
    """Encode what shall be cached, then move models that are no longer needed off the device."""
    choice, precision = options[DataOptions], options[PrecisionOptions]
    identity = f"{arch.identity(options[arch.ModelOptions])} {precision.weight_dtype}"
    keeps = precision.highvram
    device = accelerator.device
    if choice.caches_latents:
        vae = models.vae
        assert vae is not None
        to_disk, size = choice.cache_latents_to_disk, choice.vae_batch_size
        with torch.no_grad():
            fill_latents(
                data, lambda pixels: _encode_pixels(arch, vae, pixels, device), identity=identity, to_disk=to_disk, batch_size=size
            )
        if not keeps:
            vae.to("cpu")
    if choice.caches_text:
        to_disk, size = choice.cache_text_encoder_outputs_to_disk, choice.text_encoder_batch_size or choice.train_batch_size
        with torch.no_grad(), accelerator.autocast():
            encode = partial(_encode_captions, arch, models, options, device)
            fill_text(data, encode, identity=identity + _merged_identity(options), to_disk=to_disk, batch_size=size)
        if not keeps:
            for encoder in models.text_encoders:
                encoder.to("cpu")


def epochs_of(data: TrainingData, epochs: int, accelerator: Accelerator) -> Iterator[tuple[int, Iterator[Batch]]]:
    """The epochs (counted from 1), each with this rank's batches in order; workers live on where the user wants them persistent."""
    workers = 0 if data.has_latents_in_memory else worker_count(data.options)
    load = partial(batch_loader, data, rank=accelerator.process_index, world=accelerator.num_processes, workers=workers)
    if workers and data.options.persistent_data_loader_workers:
        for epoch, batches in groupby(load(0, epochs=epochs), key=lambda batch: batch.epoch):
            yield epoch + 1, batches
    else:
        for epoch in range(epochs):
            yield epoch + 1, iter(load(epoch))


def _merged_identity(options: OptionSet) -> str:
    """What `--base_weights` add to the identity of cached text: they may have changed the text encoders."""
    network = options[NetworkOptions]
    return "".join(f" {sampled_file_hash(Path(file))}" for file in network.base_weights) + f" {network.base_weights_multiplier}"


def _encode_pixels(arch: Architecture, vae: nn.Module, pixels: Tensor, device: torch.device) -> Tensor:
    return arch.encode_images(vae, pixels.to(device), None).float().cpu()


def _encode_captions(arch: Architecture, models: Models, options: OptionSet, device: torch.device, captions: list[str]) -> TextStates:
    tokens = arch.tokenize(models.tokenizers, captions, options[arch.ModelOptions])
    states = arch.encode_text(models.text_encoders, {name: ids.to(device) for name, ids in tokens.items()})
    return {name: (state.float() if state.is_floating_point() else state).cpu() for name, state in states.items()}
