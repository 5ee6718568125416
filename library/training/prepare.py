"""Before the first step: accelerator, seed, training data and caches."""

import random
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import listing
from library.data.batch import Batch
from library.data.building import build_training_data
from library.data.captions.composing import longest_captions
from library.data.dataset import TrainingData
from library.data.loader import batch_loader, workers_for
from library.data.options import DataOptions
from library.models.architecture import Architecture, Models
from library.models.vae_pieces import set_pieces
from library.training.adapters import NetworkOptions
from library.training.memory.options import MemoryOptions, refuse_memory_options
from library.training.parallel.choice import accelerator_arguments
from library.training.precision import PrecisionOptions, refuse_what_the_device_cannot
from library.training.tracking.options import LogOptions
from library.training.tracking.trackers import start_trackers

logger = get_logger(__name__)


def make_accelerator(options: OptionSet) -> Accelerator:
    """Accelerate's engine for this run, with its trackers ready. Raises `ValueError` for what the device cannot do."""
    log = options[LogOptions]
    accelerator = Accelerator(log_with=list(log.trackers) or None, project_dir=log.project_dir(), **accelerator_arguments(options))
    refuse_what_the_device_cannot(options[PrecisionOptions], accelerator.device)
    refuse_memory_options(options, accelerator.device)
    start_trackers(accelerator, log, options.values())
    return accelerator


def resolved_seed(seed: int | None, of_state: int | None = None) -> int:
    """The seed of the run: the user's, or that of the state it goes on from, or one drawn from the system and logged.

    It is drawn once for all processes, which must all ask.
    """
    seed = of_state if seed is None else seed
    if seed is None:
        [seed] = broadcast_object_list([random.SystemRandom().randrange(2**32)])
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
    return build_training_data(
        data,
        seed=seed,
        resolution_step=arch.resolution_step,
        default_resolution=arch.default_resolution,
        pixels_per_latent=arch.pixels_per_latent,
    )


def load_models(arch: Architecture, options: OptionSet, device: torch.device, *, denoiser_waits: bool = False) -> Models:
    """The models on the device; a denoiser that waits, or whose blocks are swapped, stays in main memory until it is placed."""
    memory = options[MemoryOptions]
    waits = denoiser_waits or memory.blocks_to_swap > 0
    first = torch.device("cpu") if waits else device
    models = arch.load(options[arch.ModelOptions], device=first, dtype=options[PrecisionOptions].weight_dtype)
    for module in [*models.text_encoders, models.vae] if waits else []:
        if module is not None:
            module.to(device)
    if models.vae is not None:
        set_pieces(models.vae, one_by_one=memory.vae_slicing, in_tiles=memory.vae_tiling)
    return models


def tell_cut_captions(arch: Architecture, models: Models, data: TrainingData, model_options: Any) -> None:
    """Warn, once and by name, of captions that may be longer than the text encoders read: of each line with its longest choices."""
    forms = [(image, caption) for image in data.images for caption in longest_captions(image.caption, image.options)]
    over = arch.overlong(models.tokenizers, [caption for _, caption in forms], model_options) if forms else []
    cut: dict[Path, int] = {}
    for (image, _), tokens in zip(forms, over, strict=True):
        if tokens:
            cut[image.path] = max(tokens, cut.get(image.path, 0))
    if cut:
        worst = sorted(cut, key=cut.__getitem__, reverse=True)
        logger.warning(
            "%d of %d captions are longer than the text encoder reads and will be cut, the longest by %d tokens: %s",
            len(cut), len({image.path for image in data.images}), cut[worst[0]], listing(f"{path} ({cut[path]})" for path in worst),
        )  # fmt: skip


def epochs_of(
    data: TrainingData, epochs: int, accelerator: Accelerator, first: int = 1, taken: int = 0
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """The epochs from `first` (counted from 1), each with this rank's batches in order, the first one without the `taken` that it had.

    An epoch of which all was taken comes too, empty: what is due after it may still be. Workers live on where the user wants that.
    """
    world, workers = accelerator.num_processes, workers_for(data)
    load = partial(batch_loader, data, rank=accelerator.process_index, world=world, workers=workers)
    if taken == data.batches_per_epoch(world):
        yield first, iter(())
        first, taken = first + 1, 0
    if workers and data.options.persistent_data_loader_workers:
        loader = load(first - 1, start=taken * world, epochs=epochs + 1 - first) if first <= epochs else ()
        for epoch, batches in groupby(loader, key=lambda batch: batch.epoch):
            yield epoch + 1, batches
    else:
        for epoch in range(first, epochs + 1):
            yield epoch, iter(load(epoch - 1, start=taken * world))
            taken = 0
