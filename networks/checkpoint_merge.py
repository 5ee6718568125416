"""Adapters merged into a checkpoint on disk, tensor by tensor: no model is loaded, and memory holds one tensor at a time.

A changed tensor is W + the sum of strength * dW, in float32, rounded once. What no adapter changes is copied byte for byte.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from library.core.log import get_logger
from library.core.tensor_file import listing
from library.core.tensor_stream import DTYPES, Entry, TensorReader, Written, aligned, write_stream
from library.models.naming import Naming, Place
from networks.base import Adapter
from networks.checkpoint_layers import CheckpointTensors, Parts, check_layers
from networks.members import Member

logger = get_logger(__name__)

BODY_HASH = "modelspec.hash_sha256"  # of the bytes after the header: a merged file needs its own
BLOCK = 1 << 18  # numbers summed at once: a MiB of float32
NOT_COPIED = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", ".*")  # of a folder, whose weights are written anew


@dataclass(kw_only=True)
class Merge:
    """One adapter file to be merged at its strength; while it is, rms(strength * dW) / rms(W) of each layer is noted."""

    members: Sequence[Member]
    strength: float
    relative_changes: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one tensor of its layer: the delta of the weight, or of the bias."""

    adapter: Adapter
    merge: Merge
    leaf: str

    def delta(self, base: Tensor) -> Tensor:
        """The delta of the tensor whose value is `base`, in float32 or better."""
        if self.leaf == "weight":
            return self.adapter.delta_weight(base)
        bias = self.adapter.delta_bias()
        assert bias is not None
        return bias


Changes = dict[str, dict[Place, list[Change]]]
"""By the key of the stored tensor, then by the part of it that one layer has (a third of a fused projection)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to each tensor of a checkpoint."""

    tensors: CheckpointTensors
    changes: Changes
    precision: torch.dtype | None
    metadata: Mapping[str, str]

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that a tensor is written in."""
        return self.precision if self.precision is not None and stored.is_floating_point else stored


@torch.no_grad()
def merge_into(
    checkpoint: Path,
    out: Path,
    naming: Naming,
    parts: Parts,
    merges: Sequence[Merge],
    *,
    precision: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    allow_partial: bool = False,
) -> list[Written]:
    """Write `checkpoint` with all merges to `out`; `precision` None keeps every dtype. `metadata` is added to the checkpoint's.

    A diffusers folder becomes a folder. `allow_partial` leaves out, and names, layers that the checkpoint lacks; else they are a
    `ValueError`, as are layers of another shape, results that the dtype cannot hold, and a folder `out` that exists.
    """
    tensors = CheckpointTensors(checkpoint, naming, parts)
    try:
        plan = Plan(tensors=tensors, changes=_changes(tensors, merges, allow_partial), precision=precision, metadata=metadata or {})
        if checkpoint.is_dir():
            return _write_folder(plan, out)
        ((prefix, reader),) = tensors.files
        return [_write_file(plan, prefix, reader, out)]
    finally:
        tensors.close()


@torch.no_grad()
def merged_tensor(stored: Tensor, changes: Mapping[Place, Sequence[Change]], dtype: torch.dtype) -> Tensor:
    """`stored`, which is overwritten, with all changes, in `dtype`. Raises `ValueError` for values that are not finite there."""
    result = stored
    if stored.dtype != dtype:
        result = torch.empty_like(stored, dtype=dtype)
        _add((), stored, result)
    for place, own in changes.items():
        _add(own, place.view(stored), place.view(result))
    return result


def _add(changes: Sequence[Change], base: Tensor, result: Tensor) -> None:
    """Write base + all deltas to `result`, which may be `base`; each is a change of the base alone, as where several are attached.

    In blocks that stay in the cache: the sum is bound by memory, and would else run over the weight ten times.
    """
    if base.numel() == 0:
        return
    deltas = [change.delta(base) for change in changes]
    squares = torch.zeros(1 + len(deltas), dtype=torch.float64)
    largest = torch.zeros(())
    rows = max(1, BLOCK * base.shape[0] // base.numel()) if base.dim() else 1
    blocks = [torch.atleast_1d(tensor).split(rows) for tensor in (result, base, *deltas)]
    for goal, block, *parts in zip(*blocks, strict=True):
        total = block.to(torch.float32 if block.itemsize < 4 else block.dtype, copy=True)
        squares += torch.stack([torch.linalg.vector_norm(part).double().square() for part in (total, *parts)])
        for part, change in zip(parts, changes, strict=True):
            total.add_(part.to(total), alpha=change.merge.strength)
        low, high = total.aminmax()
        largest = torch.maximum(largest, torch.maximum(-low, high))  # nan stays nan
        goal.copy_(total)
    _check_range(float(largest), result.dtype)
    for change, square in zip(changes, squares[1:], strict=True):
        if change.leaf == "weight":
            change.merge.relative_changes.append(abs(change.merge.strength) * float((square / squares[0]).sqrt()))


def _check_range(largest: float, dtype: torch.dtype) -> None:
    if not largest <= torch.finfo(dtype).max:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"would hold {largest:g}, which {name} cannot; lower the strengths, or choose --precision bf16 or float")


# Planning


def _changes(tensors: CheckpointTensors, merges: Sequence[Merge], allow_partial: bool) -> Changes:
    """Every change, by its place. Raises `ValueError` with all that does not fit."""
    every = [(member, merge) for merge in merges for member in merge.members]
    present = [(member, merge) for member, merge in every if tensors.has(member.part, member.target)]
    if present and allow_partial and len(present) < len(every):
        lacking = [member.target.name for member, _ in every if not tensors.has(member.part, member.target)]
        logger.warning("%s has no place for %d adapters, which are left out: %s", tensors.path, len(lacking), listing(lacking))
        every = present
    check_layers([member for member, _ in every], tensors)
    changes: Changes = {}
    for member, merge in every:
        for leaf in ("weight",) if member.adapter.delta_bias() is None else ("weight", "bias"):
            place = tensors.place(member.part, member.target, leaf)
            if place is None:
                raise ValueError(f"{tensors.path}: has no {leaf} for {member.target.name}, which the adapter changes")
            changes.setdefault(place.key, {}).setdefault(place, []).append(Change(member.adapter, merge, leaf))
    return changes


# Writing


def _write_file(plan: Plan, prefix: str, reader: TensorReader, out: Path) -> Written:
    entries = aligned(Entry(name, plan.dtype(DTYPES[info.dtype]), info.shape) for name, info in reader.tensors.items())
    kept = {key: value for key, value in reader.header.metadata.items() if not key.startswith("sshs_")}  # hashes that hold no longer
    described = kept | dict(plan.metadata)
    tensors = (_merged(plan, prefix, reader, entry) for entry in entries)
    return write_stream(out, entries, tensors, described, body_hash=BODY_HASH if BODY_HASH in described else None)


def _write_folder(plan: Plan, out: Path) -> list[Written]:
    """All files beside `out`, then one rename of the folder."""
    if out.exists():
        raise ValueError(f"{out}: exists already; a folder is not overwritten")
    beside = out.with_name(f".{out.name}.{uuid4().hex[:8]}.part")
    written: list[Written] = []
    try:
        shutil.copytree(plan.tensors.path, beside, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for prefix, reader in plan.tensors.files:
            place = Path(prefix, reader.path.name)
            result = _write_file(plan, prefix, reader, beside / place)
            written.append(Written(out / place, result.size, result.sha256))
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return written


def _merged(plan: Plan, prefix: str, reader: TensorReader, entry: Entry) -> Tensor:
    stored = reader.read(entry.name)
    changes = plan.changes.get(prefix + entry.name, {})
    if not changes and stored.dtype == entry.dtype:
        return stored
    try:
        return merged_tensor(stored, changes, entry.dtype)
    except ValueError as error:
        raise ValueError(f"{plan.tensors.path}: '{entry.name}' {error}") from None
