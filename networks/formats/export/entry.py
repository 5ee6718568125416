"""What writers work with: layers on their way into a file, wishes, and what a tool cannot be told."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from library.core.tensor_file import listing
from networks.base import Adapter
from networks.checkpoint_layers import CheckpointTensors
from networks.layers import dense_weight
from networks.members import Member


class Refusal(ValueError):
    """Why a tool cannot be told a layer, and what would work: in the same words for all layers alike."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user chooses about an export.

    `as_lora`: make every layer a LoRA, exactly, or of `rank` at most, or of the lowest rank with the relative error `max_error`.
    `dotted`: ComfyUI's dotted names. `keep_magnitudes`: for a ComfyUI that measures DoRA's norm on the changed weight.
    `standalone`: names of LyCORIS' own wrapper, for one model outside of sd-scripts.
    `allow_partial`: leave out layers that the tool cannot be told, and say which.
    """

    as_lora: bool = False
    rank: int | None = None
    max_error: float | None = None
    dotted: bool = False
    standalone: bool = False
    keep_magnitudes: bool = False
    allow_partial: bool = False

    @property
    def truncates(self) -> bool:
        """Whether layers may lose something."""
        return self.rank is not None or self.max_error is not None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A layer as it was given (`member`), as it will be written (`adapter`), and what was done in between."""

    member: Member
    adapter: Adapter
    notes: tuple[str, ...] = ()
    error: float = 0.0  # relative, of conversions that lose something
    magnitudes_moved: bool = False  # DoRA's magnitudes mean something else to this reader

    def rewritten(self, adapter: Adapter, note: str, **changes: Any) -> "Entry":
        """The entry with another adapter in its place, and the note that says why."""
        return replace(self, adapter=adapter, notes=(*self.notes, note), **changes)

    def remade(self, tensors: Mapping[str, Tensor], note: str, **changes: Any) -> "Entry":
        """The entry with an adapter of the same algorithm made of other tensors."""
        adapter = self.adapter
        return self.rewritten(type(adapter).from_tensors(adapter.name, adapter.layer, tensors), note, **changes)


@dataclass
class Plan:
    """The entries of an export, and the refusals met on the way: reason -> names of layers."""

    entries: list[Entry]
    refused: dict[str, list[str]] = field(default_factory=dict)

    def each(self, *steps: Callable[[Entry], Entry]) -> None:
        """Put every entry through the steps; those that are refused are left out."""
        for step in steps:
            kept = []
            for entry in self.entries:
                try:
                    kept.append(step(entry))
                except Refusal as refusal:
                    self.refuse([entry], str(refusal))
            self.entries = kept

    def refuse(self, entries: Sequence[Entry], reason: str) -> None:
        """Leave out these entries for this reason."""
        names = [entry.member.target.name for entry in entries]
        self.refused.setdefault(reason, []).extend(names)
        self.entries = [entry for entry in self.entries if entry.member.target.name not in names]

    def problems(self) -> list[str]:
        """The refusals as lines for the user."""
        return [f"{reason} ({_count(names)}: {listing(names, 3)})" for reason, names in self.refused.items()]


@dataclass(frozen=True)
class Bases:
    """The weights that the layers change: of the models at hand, or of a checkpoint where those are on the meta device."""

    checkpoint: CheckpointTensors | None = None

    def weight(self, member: Member) -> Tensor | None:
        """The weight of a member's layer in float32, or None where there is none to be had."""
        layer: nn.Module = member.adapter.layer
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and not weight.is_meta:
            return dense_weight(layer).float()
        if self.checkpoint is None or not self.checkpoint.has(member.part, member.target):
            return None
        return self.checkpoint.weight(member.part, member.target).float()


def kinds(entries: Iterable[Entry]) -> list[str]:
    """The titles of the algorithms, in the order in which they occur."""
    return list(dict.fromkeys(entry.adapter.title for entry in entries))


def _count(names: Sequence[str]) -> str:
    return "1 layer" if len(names) == 1 else f"{len(names)} layers"
