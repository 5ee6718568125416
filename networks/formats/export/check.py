"""Whether what was written means what was given: read back by our own importer, layer by layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.core.tensor_file import listing
from library.models.naming import Naming
from networks.base import Adapter
from networks.files import AdapterFile
from networks.formats.export.entry import Bases, Entry
from networks.formats.export.writer import Parts, Written
from networks.formats.peft_config import PeftConfig
from networks.formats.reader import read_members
from networks.rewriting.algebra import relative_error

EXACT, CONVERTED = 1e-6, 1e-5  # relative errors in float32: as it was given, and rewritten
WRAPPER = "base_model.model."


def errors_of(entries: Sequence[Entry], files: Mapping[str, Written], naming: Naming, parts: Parts, bases: Bases) -> dict[str, float]:
    """The relative error of each layer's change, by name, as our importer reads the files.

    Raises `ValueError` naming layers that are not found again, and layers that lost more than they may.
    """
    found = {member.target.name: member.adapter for member in read_members(as_file(files), naming, parts)}
    lost = [entry.member.target.name for entry in entries if entry.member.target.name not in found]
    if lost:
        raise ValueError(f"{len(lost)} layers are not found in what was written: {listing(lost)}")
    errors = {entry.member.target.name: error_of(entry, found[entry.member.target.name], bases) for entry in entries}
    dtypes = {tensor.dtype for file in files.values() for tensor in file.tensors.values()}
    loose = max(torch.finfo(dtype).eps for dtype in dtypes) * 4  # a LoHa rounds four factors
    worse = {}
    for entry in entries:
        error = errors[entry.member.target.name]
        allowed = entry.error * 1.001 + max(CONVERTED if entry.notes else EXACT, loose)
        if not error <= allowed:
            worse[entry.member.target.name] = error
    if worse:
        names = [f"{name} ({error:.1e})" for name, error in sorted(worse.items(), key=lambda pair: -pair[1])]
        raise ValueError(
            f"{len(worse)} layers lose more than they may, relative to their change: {listing(names, 4)}; try --precision fp32"
        )
    return errors


def as_file(files: Mapping[str, Written]) -> AdapterFile:
    """What the importer would read from these files."""
    configs = {place: PeftConfig.of(file.config, place) for place, file in files.items() if file.config is not None}
    tensors: dict[str, Tensor] = {}
    for place, file in files.items():
        for key, tensor in file.tensors.items():
            tensors[f"{place}.{key.removeprefix(WRAPPER)}" if place else key] = tensor
    return AdapterFile(tensors=tensors, config=configs)


def error_of(entry: Entry, found: Adapter, bases: Bases) -> float:
    """The relative error of one layer: of the whole change, or under DoRA of direction and magnitudes, the worst of all."""
    given, written = entry.member.adapter, entry.adapter
    if is_same(given, found):
        return 0.0
    if given.dora_scale is not None and found.dora_scale is None:
        pairs = [(found.delta_weight(), given.delta_weight(bases.weight(entry.member)))]
    else:
        pairs = [(found.direction(), given.direction())]
    if found.dora_scale is not None and written.dora_scale is not None:
        pairs.append((found.dora_scale.flatten(), written.dora_scale.flatten()))
    biases = found.delta_bias(), given.delta_bias()
    if biases[0] is not None and biases[1] is not None:
        pairs.append((biases[0], biases[1]))
    return max(relative_error(value, expected) for value, expected in pairs)


def is_same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters have the same tensors to the last bit."""
    tensors, others = one.file_tensors(), other.file_tensors()
    return (
        type(one) is type(other) and tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    )
