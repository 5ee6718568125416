"""What a run keeps on the device, what waits in main memory, and what is computed twice instead."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from library.core.command_line import OptionSet
from library.core.options import OptionError, option
from library.core.rules import Rule
from library.models.architecture import Architecture
from library.training.memory.block_swap import check_count, swap_refusal

UNITS = {"": 2**30, "gb": 2**30, "gib": 2**30, "mb": 2**20, "mib": 2**20}
BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|[a-zA-Z]*)")
OFFLOADS = ("cpu_offload_checkpointing", "unsloth_offload_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A bound on the activations of one step: in bytes, or as a share of what they take where none is computed twice."""

    bytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`6GB`, `6` (both 6 * 2^30 bytes), `600MB` or `50%`. Raises `ValueError` for anything else."""
        found = BUDGET.fullmatch(text.strip())
        if found is None or (found["unit"] != "%" and found["unit"].lower() not in UNITS):
            raise ValueError(f"'{text}' is no amount of memory; write it as 6GB, 600MB or 50%")
        number = float(found["number"])
        if number <= 0 or (found["unit"] == "%" and number > 100):
            raise ValueError(f"'{text}' must be more than 0, and a share at most 100%")
        if found["unit"] == "%":
            return cls(share=number / 100)
        return cls(bytes=int(number * UNITS[found["unit"].lower()]))

    def within(self, unbounded: int) -> int:
        """The bound in bytes, where the activations take `unbounded` bytes without recomputation."""
        return int(self.share * unbounded) if self.bytes is None and self.share is not None else self.bytes or 0


def _checkpoints_nothing(values: dict[str, Any]) -> bool:
    return not (values["gradient_checkpointing"] or values["activation_memory_budget"])


def _caches_nothing(values: dict[str, Any]) -> bool:
    caches = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
    return not any(values[name] for name in caches)


def _encodes_one_at_a_time(values: dict[str, Any]) -> bool:
    return (values["cache_latents"] or values["cache_latents_to_disk"]) and values["vae_batch_size"] == 1


NOTHING_CHECKPOINTED = "nothing is checkpointed; add --gradient_checkpointing or --activation_memory_budget"


@dataclass(kw_only=True, frozen=True)
class MemoryOptions:
    """Memory."""

    gradient_checkpointing: bool = option(False, help="recompute activations in the backward pass: less memory, more time")
    activation_memory_budget: str | None = option(
        None, help="recompute just so much that the activations fit: 6GB, 600MB, or 50% of what they take without recomputation"
    )
    cpu_offload_checkpointing: bool = option(
        False, help="what checkpoints keep waits in main memory, copied beside the computation: less memory, a little more time"
    )
    unsloth_offload_checkpointing: bool = option(False, help="the same as --cpu_offload_checkpointing")
    blocks_to_swap: int = option(
        0, help="blocks of the denoiser that wait in main memory and visit the GPU one by one: less memory, more time"
    )
    lowram: bool = option(False, help="main memory is short: what only previews still need stays on the device instead of waiting there")
    highvram: bool = option(False, help="keep the VAE and text encoders on the device when they are no longer needed")
    vae_slicing: bool = option(False, help="the VAE takes the pictures of a batch one by one: less memory, the same result")
    vae_tiling: bool = option(False, help="the VAE takes large pictures in overlapping tiles: less memory, a slightly different result")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            option="gradient_checkpointing",
            when=lambda v: v["gradient_checkpointing"] and v["activation_memory_budget"],
            because="--activation_memory_budget chooses what is recomputed",
        ),
        *(Rule(option=name, when=_checkpoints_nothing, because=NOTHING_CHECKPOINTED) for name in OFFLOADS),
        Rule(option="vae_slicing", when=_encodes_one_at_a_time, because="--vae_batch_size 1 gives the VAE one picture at a time anyway"),
        Rule(option="lowram", when=lambda v: v["highvram"], because="--highvram keeps the models on the device anyway"),
        Rule(
            option="lowram",
            when=lambda v: not v["highvram"] and (v["sample_prompts"] is None or _caches_nothing(v)),
            because="it is about models that are needed for previews only: with a cache and --sample_prompts",
        ),
        Rule(option="highvram", when=_caches_nothing, because="without a cache the models are needed on the device anyway"),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: a negative number of blocks, a budget that cannot be read."""
        if self.blocks_to_swap < 0:
            yield f"--blocks_to_swap {self.blocks_to_swap}: must not be negative"
        if self.activation_memory_budget is not None:
            try:
                Budget.parse(self.activation_memory_budget)
            except ValueError as error:
                yield f"--activation_memory_budget: {error}"

    @property
    def budget(self) -> Budget | None:
        """The bound on the activations, or None where none was given."""
        return None if self.activation_memory_budget is None else Budget.parse(self.activation_memory_budget)

    @property
    def checkpoints(self) -> bool:
        """Is anything computed twice?"""
        return self.gradient_checkpointing or self.budget is not None

    @property
    def offloads(self) -> bool:
        """Does what checkpoints keep wait in main memory?"""
        return self.checkpoints and (self.cpu_offload_checkpointing or self.unsloth_offload_checkpointing)


def refuse_without_blocks(arch: Architecture, options: MemoryOptions, model_options: Any = None) -> None:
    """Raise `ValueError` for options about the denoiser's blocks, where there is no row of them, or not as many.

    `model_options` say which files to look into; only their headers are read.
    """
    given = {"blocks_to_swap": "swapped", "activation_memory_budget": "computed twice one by one"}
    problems = (
        f"--{name}: the denoiser of {arch.title} has no row of blocks that could be {done}; leave it out"
        for name, done in given.items()
        if getattr(options, name) and not arch.has_blocks
    )
    if found := list(problems):
        raise OptionError(found)
    if options.blocks_to_swap:
        check_count(options.blocks_to_swap, len(arch.blocks(arch.outlined(model_options).denoiser)))


def refuse_memory_options(options: OptionSet, device: torch.device) -> None:
    """Raise `OptionError` with all memory options that this device makes impossible."""
    memory = options[MemoryOptions]
    problems = []
    if memory.blocks_to_swap and (reason := swap_refusal(device)):
        problems.append(f"--blocks_to_swap: {reason}; leave it out, or give --blocks_to_swap 0 over a preset")
    if memory.offloads and (reason := swap_refusal(device)):
        [name, *_] = (name for name in OFFLOADS if getattr(memory, name))
        problems.append(f"--{name}: {reason}; leave it out")
    if problems:
        raise OptionError(problems)
