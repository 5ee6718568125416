"""The contract of a writer: what a tool's reader understands, and how layers are put so that it does."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.models.naming import Naming, Part, Target
from networks.formats.export.entry import Bases, Entry, Plan, Wishes

Parts = Sequence[tuple[Part, nn.Module]]

LORA = ("lora_down.weight", "lora_up.weight", "alpha")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha")
DIFFERENCE = ("diff", "diff_b", "w_norm", "b_norm")


@dataclass(frozen=True)
class Written:
    """One file: its tensors by key, and for PEFT the configuration beside them."""

    tensors: dict[str, Tensor]
    config: Mapping[str, Any] | None = None


class Writer(ABC):
    """One tool. Instances hold no state."""

    name: ClassVar[str]  # of --to
    reader: ClassVar[str]  # what reads it, for messages
    suffix: ClassVar[str] = ".safetensors"  # nothing where a folder is written
    has_alpha: ClassVar[bool] = True  # whether what sd-scripts' metadata says of dim and alpha holds for the file

    @abstractmethod
    def rewrite(self, plan: Plan, naming: Naming, wishes: Wishes, bases: Bases) -> None:
        """Put the entries of the plan so that the reader means the same delta; refuse those that it cannot be told."""

    @abstractmethod
    def layer_name(self, entry: Entry, naming: Naming, wishes: Wishes) -> str:
        """The name that stands before the layer's parameters."""

    @abstractmethod
    def known_names(self, naming: Naming, part: Part, target: Target) -> Mapping[str, tuple[str, ...]]:
        """Every name by which the reader knows a layer, with the parameters that it reads under that name."""

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a layer by the reader's names of the parameters."""
        return entry.adapter.file_tensors()

    def files(self, entries: Sequence[Entry], naming: Naming, wishes: Wishes) -> dict[str, Written]:
        """The files by their place in the output; a single file has the place ""."""
        tensors = {
            f"{self.layer_name(entry, naming, wishes)}.{key}": tensor for entry in entries for key, tensor in self.tensors(entry).items()
        }
        return {"": Written(tensors)}

    def network_arguments(self, entries: Sequence[Entry]) -> dict[str, str]:
        """The network arguments without which the tool does not read the file."""
        return {}

    def hints(self, entries: Sequence[Entry]) -> list[str]:
        """What the user has to do for the tool to read it."""
        arguments = " ".join(f"{name}={value}" for name, value in self.network_arguments(entries).items())
        return [f"{self.reader} reads this file with --network_args {arguments}"] if arguments else []

    def ignored_keys(self, keys: Iterable[str], naming: Naming, parts: Parts) -> list[str]:
        """The keys of a file that the reader would not use: of layers or parameters that it does not know."""
        names: dict[str, set[str]] = {}
        for part, module in parts:
            for target in (*naming.targets(part, module), *naming.outside(part, module)):
                for name, parameters in self.known_names(naming, part, target).items():
                    names.setdefault(name, set()).update(parameters)
        known = {parameter for parameters in names.values() for parameter in parameters}
        return [key for key in keys if not any(self._is_read(key, parameter, names) for parameter in known)]

    def lacking_keys(self, keys: Iterable[str]) -> list[str]:
        """Keys without which the reader fails, although the meaning is plain."""
        return []

    @staticmethod
    def _is_read(key: str, parameter: str, names: Mapping[str, set[str]]) -> bool:
        return key.endswith(f".{parameter}") and parameter in names.get(key[: -len(parameter) - 1], ())


def without_alpha(keys: Iterable[str], signature: tuple[str, ...]) -> list[str]:
    """The alpha that each layer with one of these parameters lacks."""
    keys = list(keys)
    ends = tuple(f".{name}" for name in signature if name != "alpha")
    layers = dict.fromkeys(key.partition(".")[0] for key in keys if key.endswith(ends))
    there = set(keys)
    return [f"{layer}.alpha" for layer in layers if f"{layer}.alpha" not in there]


def plainly(value: float) -> float | int:
    """A number as JSON should show it: 8 rather than 8.0; float32's digits rather than float64's."""
    value = float(f"{value:.9g}")
    return int(value) if value == int(value) else value


def most_common(values: Iterable[float]) -> float:
    """The value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


def fold_scale(entry: Entry) -> dict[str, Tensor]:
    """LoRA's tensors with the scale in its factors, and without alpha.

    Both take about its root, so that neither leaves the range of half precision; a power of two stays one, which is exact.
    """
    tensors = entry.adapter.file_tensors()
    tensors.pop("alpha")
    scale = entry.adapter.scale
    mantissa, exponent = math.frexp(abs(scale))
    first = 2.0 ** ((exponent - 1) // 2) if mantissa == 0.5 else math.sqrt(abs(scale))
    for name, factor in (("lora_up.weight", first), ("lora_down.weight", scale / first)):
        if factor != 1:
            tensors[name] = (tensors[name].double() * factor).to(torch.promote_types(tensors[name].dtype, torch.float32))
    return tensors
