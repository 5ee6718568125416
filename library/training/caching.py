"""Filling the caches of a run: what is encoded by which model, and what the entries are named by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.core.command_line import OptionSet
from library.core.file_hash import sampled_file_hash
from library.data.batch import TextStates
from library.data.caches import fill_latents, fill_text
from library.data.dataset import TrainingData
from library.data.options import DataOptions
from library.models.architecture import Architecture, Models
from library.training.adapters import NetworkOptions
from library.training.memory.options import MemoryOptions
from library.training.precision import PrecisionOptions
from library.training.previews import PreviewOptions


def fill_caches(arch: Architecture, models: Models, data: TrainingData, options: OptionSet, accelerator: Accelerator) -> None:
    """Encode what shall be cached, then move models that are no longer needed off the device: see `release_models`."""
    choice, memory = options[DataOptions], options[MemoryOptions]
    keeps = memory.highvram or (memory.lowram and _previews_need_them(options))
    if choice.caches_latents:
        assert models.vae is not None
        cache_latents(arch, models.vae, data, options, accelerator)
        if not keeps:
            models.vae.to("cpu")
    if choice.caches_text:
        cache_text(arch, models.text_encoders, models.tokenizers, data, options, accelerator)
        if not keeps:
            for encoder in models.text_encoders:
                encoder.to("cpu")
    if not keeps and accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def release_models(models: Models, options: OptionSet) -> None:
    """Free the models that nothing needs any more: what they give is cached, and no previews are drawn. Call it once the network is made.

    They stay as outlines without weights; `--highvram` keeps them whole.
    """
    if options[MemoryOptions].highvram or _previews_need_them(options):
        return
    choice = options[DataOptions]
    encoders, vae = models.text_encoders if choice.caches_text else (), models.vae if choice.caches_latents else None
    for module in (*encoders, vae):
        if module is not None:
            module.to("meta")


def cache_latents(arch: Architecture, vae: nn.Module, data: TrainingData, options: OptionSet, accelerator: Accelerator) -> None:
    """Encode the images. Raises `ValueError` as `library.data.caches.fill_latents` does."""
    choice = options[DataOptions]
    tiled = " tiled" if options[MemoryOptions].vae_tiling else ""  # the only piece of it that changes numbers

    def encode(pixels: Tensor) -> Tensor:
        return arch.encode_images(vae, pixels.to(accelerator.device), None)

    with torch.no_grad():
        fill_latents(
            data,
            encode,
            identity=f"{arch.latents_identity(options[arch.ModelOptions])} {next(vae.parameters()).dtype}{tiled}",
            to_disk=choice.cache_latents_to_disk,
            batch_size=choice.vae_batch_size,
            shard=(accelerator.process_index, accelerator.num_processes),
            npz=arch.npz_latents(),
        )


def cache_text(
    arch: Architecture,
    text_encoders: Sequence[nn.Module],
    tokenizers: Sequence[Any],
    data: TrainingData,
    options: OptionSet,
    accelerator: Accelerator,
) -> None:
    """Encode the captions. Raises `ValueError` as `library.data.caches.fill_text` does."""
    choice, model_options = options[DataOptions], options[arch.ModelOptions]

    def encode(captions: list[str]) -> TextStates:
        tokens = arch.tokenize(tokenizers, captions, model_options)
        states = arch.encode_text(text_encoders, {name: ids.to(accelerator.device) for name, ids in tokens.items()})
        return {name: (state.float() if state.is_floating_point() else state).cpu() for name, state in states.items()}

    with torch.no_grad(), accelerator.autocast():
        fill_text(
            data,
            encode,
            identity=f"{arch.text_identity(model_options)} {options[PrecisionOptions].weight_dtype}{_merged_identity(options)}",
            to_disk=choice.cache_text_encoder_outputs_to_disk,
            batch_size=choice.text_encoder_batch_size or choice.train_batch_size,
            shard=(accelerator.process_index, accelerator.num_processes),
            npz=None if options[NetworkOptions].base_weights else arch.npz_text(text_encoders, model_options),
        )


def _previews_need_them(options: OptionSet) -> bool:
    return options[PreviewOptions].sample_prompts is not None


def _merged_identity(options: OptionSet) -> str:
    """What `--base_weights` add to the identity of cached text: they may have changed the text encoders."""
    network = options[NetworkOptions]
    return "".join(f" {sampled_file_hash(Path(file))}" for file in network.base_weights) + f" {network.base_weights_multiplier}"
