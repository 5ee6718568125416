"""Activations that are computed again in the backward pass instead of being kept: `--gradient_checkpointing` and what goes with it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.core.log import get_logger
from library.training.memory.budget import Activations, blocks_to_repeat, in_words
from library.training.memory.offload import Offload
from library.training.memory.options import MemoryOptions
from library.training.model import TrainingModel

logger = get_logger(__name__)
Call = Callable[..., Any]


def set_checkpointing(model: TrainingModel, options: MemoryOptions, device: torch.device, measure: Callable[[], Activations]) -> None:
    """Let the denoiser's blocks, and text encoders that are trained, be computed twice as the options ask.

    `device` is where the model trains, wherever it waits now. `measure` tells what a step keeps (see `memory.budget`); it is called
    where a budget bounds that. Call this before blocks are compiled or swapped. Raises `OptionError` for a budget too small.
    """
    if not options.checkpoints:
        return
    checkpoint_text_encoders(model.text_encoders if model.trains_text_encoders else [])
    denoiser: Any = model.denoiser
    twice: Call = Offload(device) if options.offloads else _checkpointed
    if options.budget is None:
        denoiser.enable_gradient_checkpointing(twice)
    else:
        blocks = model.arch.blocks(model.denoiser)
        chosen = _chosen(options, measure())
        denoiser.enable_gradient_checkpointing(_only({id(blocks[n]) for n in chosen}, twice))


def checkpoint_text_encoders(encoders: Iterable[nn.Module]) -> None:
    """Turn on gradient checkpointing in transformers' own way. No other part of an encoder leaves its mode."""
    for encoder in encoders:
        model: Any = encoder
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its older name
        enable({"use_reentrant": False})
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # a layer checkpoints in training mode only; its children, dropouts among them, stay as they are


def _chosen(options: MemoryOptions, found: Activations) -> set[int]:
    """The numbers of the blocks to compute twice within the budget, which is said."""
    assert options.budget is not None
    chosen = blocks_to_repeat(found, options.budget.within(found.unbounded), offloads=options.offloads)
    logger.info(
        "--activation_memory_budget %s: %d of %d blocks are computed twice (%.0f%% of their operations); the denoiser keeps %s at most, "
        "%s without", options.activation_memory_budget, len(chosen), len(found.blocks), 100 * found.repeated(chosen),
        in_words(found.peak(chosen, offloads=options.offloads)), in_words(found.unbounded),
    )  # fmt: skip
    return chosen


def _only(chosen: set[int], twice: Call) -> Call:
    """A call for every block, under a checkpoint for those of these identities."""

    def call(block: Call, *args: Any) -> Any:
        return twice(block, *args) if id(block) in chosen else block(*args)

    return call


def _checkpointed(block: Call, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False)
