"""The states of an optimizer: by its first step on fakes, or on a small real parameter where fakes are not enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.training.forecast.phases import optimizer_bytes, state_bytes
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer

PROBED = 64, 256  # shape of the real parameter: as many numbers as packed states need to be packed
PACKED: Mapping[str, float] = {"adamw8bit": 2, "lion8bit": 1, "sgdnesterov8bit": 1, "ademamix8bit": 3, "adamw": 8, "adamw32bit": 8}
BLOCK_SCALE = 4 / 256  # bytes of a packed number's share in its block's scale
UNPACKED_BELOW = 4096  # numbers; bitsandbytes keeps the states of smaller parameters in 32 bits
PAGED_FROM = 100_000  # numbers; bitsandbytes leaves the states of smaller parameters on the GPU
SUPPOSED = 8  # bytes a parameter of an optimizer that cannot be tried here: those of AdamW


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of the states on the GPU, what a step takes besides, bytes that may leave it, and what a person should know."""

    bytes: int
    working: int = 0
    paged: int = 0
    note: str = ""


def optimizer_states(groups: Sequence[Mapping[str, Any]], options: OptimizerOptions) -> States:
    """The states that the optimizer will have for these parameter groups, whose gradients are there; call it within `fakes`."""
    name = options.optimizer_type.rpartition(".")[2].lower()
    parameters = [parameter for group in groups for parameter in group["params"]]
    count = sum(parameter.numel() for parameter in parameters)
    if name.removeprefix("paged") in PACKED and ("8bit" in name or name.startswith("paged")):
        return _packed_states(name, [parameter.numel() for parameter in parameters])
    try:
        optimizer = build_optimizer([dict(group) for group in groups], options)
    except (ValueError, TypeError, RuntimeError) as error:
        return States(bytes=SUPPOSED * count, note=f"optimizer: {SUPPOSED} bytes a parameter are supposed, as AdamW takes ({error})")
    found = optimizer_bytes(optimizer)
    if found is not None:
        return States(bytes=found[0], working=found[1])
    size = _probed(options)
    if size is None:
        return States(bytes=SUPPOSED * count, note=f"optimizer: {SUPPOSED} bytes a parameter are supposed, as AdamW takes")
    return States(bytes=int(size * count), working=int(4 * max(parameter.numel() for parameter in parameters)))


def _packed_states(name: str, counts: Sequence[int]) -> States:
    """The states of an optimizer of bitsandbytes for parameters of so many numbers each."""
    each = PACKED[name.removeprefix("paged")]
    packed, whole = (each * (1 + BLOCK_SCALE), 4 * each) if "8bit" in name else (each, each)
    sizes = [(count, int(count * (whole if count < UNPACKED_BELOW else packed))) for count in counts]
    paged = sum(size for count, size in sizes if count >= PAGED_FROM) if name.startswith("paged") else 0
    note = "paged states leave the GPU when it is full; they are counted in main memory" if paged else ""
    return States(bytes=sum(size for _, size in sizes) - paged, paged=paged, note=note)


def _probed(options: OptimizerOptions) -> float | None:
    """Bytes of state for a number, by one step over a small real parameter; None where that fails."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.autocast("cpu", enabled=False):
        parameter = torch.nn.Parameter(torch.ones(PROBED))  # not zeros, of which some keep no copy
        parameter.grad = torch.ones(PROBED)
        try:
            optimizer = build_optimizer([{"params": [parameter], "lr": options.learning_rate}], options)
            optimizer.step()
        except (ValueError, TypeError, RuntimeError, AssertionError):
            return None
        return state_bytes(optimizer) / parameter.numel()
