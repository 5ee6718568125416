"""Adapters as other tools spell them, and what the reader makes of it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from networks.files import AdapterFile
from networks.formats.reader import read_members
from networks.members import Member

Name = Callable[[Member], str]
Values = Callable[[Member], Mapping[str, Tensor]]


def own_values(member: Member) -> dict[str, Tensor]:
    """Our own parameters."""
    return dict(member.adapter.file_tensors())


def peft_values(member: Member, adapter: str = "") -> dict[str, Tensor]:
    """PEFT's parameters: no alpha, `lora_A` and `lora_B`."""
    words = {"lora_down": "lora_A", "lora_up": "lora_B"}
    state = {key: tensor for key, tensor in own_values(member).items() if key != "alpha"}
    spelt = {}
    for key, tensor in state.items():
        word, _, rest = key.partition(".")
        spelt[".".join(filter(None, (words.get(word, word), adapter, rest)))] = tensor
    return spelt


def spelt(members: Sequence[Member], name: Name, values: Values = own_values) -> dict[str, Tensor]:
    """The tensors of a file with these names of layers and parameters."""
    return {f"{name(member)}.{key}": tensor.clone() for member in members for key, tensor in values(member).items()}


def read(small, file: AdapterFile | dict[str, Tensor], **options: bool) -> list[Member]:
    """The members that a file means on small models."""
    file = file if isinstance(file, AdapterFile) else AdapterFile(tensors=file)
    return read_members(file, small.naming, small.parts, **options)


def assert_same(found: Sequence[Member], wanted: Sequence[Member], factor: float = 1.0) -> None:
    """The same layers in the same order with the same deltas, those of `found` times `factor`."""
    assert [member.target for member in found] == [member.target for member in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.adapter.delta_weight() * factor, other.adapter.delta_weight(), rtol=1e-5, atol=1e-6)
