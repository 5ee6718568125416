"""Adapters written for other tools: every layer rewritten exactly, or refused with the reason, and read back before it counts.

exported = export(open_adapter("style.safetensors"), "comfyui")
write_export("style-comfyui.safetensors", exported)
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from library.core.atomic import write_text
from library.core.log import get_logger
from library.core.spelling import unknown
from library.core.tensor_file import listing, save_tensors
from networks.checkpoint_layers import CheckpointTensors
from networks.dora import BASE_NORM_MARK
from networks.files import COMPONENTS, CONFIG, TENSORS, save_adapter_file
from networks.formats.export.check import errors_of
from networks.formats.export.comfyui import ComfyUI
from networks.formats.export.diffusers import Diffusers
from networks.formats.export.entry import Bases, Entry, Plan, Wishes
from networks.formats.export.kohya import Kohya
from networks.formats.export.lycoris import LyCORIS
from networks.formats.export.peft import PEFT
from networks.formats.export.steps import converted
from networks.formats.export.writer import Writer, Written
from networks.formats.peft_config import METADATA
from networks.members import Member
from networks.network import Network
from networks.rewriting.combination import structure

logger = get_logger(__name__)

WRITERS: dict[str, Writer] = {writer.name: writer for writer in (Kohya(), ComfyUI(), LyCORIS(), PEFT(), Diffusers())}
WIDE = (".alpha", ".dora_scale", ".lora_magnitude_vector")  # float32 always: few numbers that scale all others
STALE = ("sshs_model_hash", "sshs_legacy_hash", "format", METADATA)  # of the file that was read
STRUCTURE = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What will be written, and how it came about."""

    target: str
    files: dict[str, Written]  # by their place in the output: "" is a single file, or PEFT's folder itself
    metadata: dict[str, str]
    entries: list[Entry]
    errors: dict[str, float]  # relative to each layer's change, by layer, as our importer reads the files
    left_out: list[str]  # with allow_partial: the reasons, each with its layers

    @property
    def hints(self) -> list[str]:
        """What the user has to do for the tool to read it."""
        return WRITERS[self.target].hints(self.entries)

    @property
    def notes(self) -> Counter[str]:
        """What was rewritten, and on how many layers."""
        return Counter(note for entry in self.entries for note in entry.notes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by key; where there are several files, with their place before it."""
        return {f"{place}/{key}".lstrip("/"): tensor for place, file in self.files.items() for key, tensor in file.tensors.items()}


@torch.no_grad()
def export(
    network: Network,
    target: str,
    *,
    base: CheckpointTensors | None = None,
    dtype: torch.dtype | None = torch.float32,
    metadata: Mapping[str, str] | None = None,
    wishes: Wishes | None = None,
) -> Export:
    """The network as `target` reads it: kohya, comfyui, lycoris, peft or diffusers.

    base: the weights that DoRA rescales, where the network's layers have none. dtype: of the factors; None keeps each tensor's own.
    metadata: of the file that the network came from. Raises `ValueError` with every reason for which layers cannot be written, and where
    what was written does not mean what was given.
    """
    writer, wishes, bases = writer_named(target), wishes or Wishes(), Bases(base)
    mark, value = BASE_NORM_MARK
    if (metadata or {}).get(mark) == value and any(adapter.dora_scale is not None for adapter in network.adapters):
        raise ValueError("the file's DoRA magnitudes were rescaled for ComfyUI; export the file that it was made from")
    plan = Plan([Entry(member=member, adapter=member.adapter) for member in network.members])
    if wishes.as_lora:
        plan.each(lambda entry: converted(entry, wishes, bases))
    writer.rewrite(plan, network.naming, wishes, bases)
    _settle(plan, writer, wishes)
    files = {place: _cast(file, dtype) for place, file in writer.files(plan.entries, network.naming, wishes).items()}
    ignored = [key for file in files.values() for key in writer.ignored_keys(file.tensors, network.naming, network.parts)]
    if ignored:
        raise ValueError(f"--to {target}: {writer.reader} would ignore {len(ignored)} keys: {listing(ignored)}")
    return Export(
        target=target,
        files=files,
        metadata=_metadata(network, plan.entries, writer, metadata or {}),
        entries=plan.entries,
        errors=errors_of(plan.entries, files, network.naming, network.parts, bases),
        left_out=plan.problems(),
    )


def write_export(path: Path | str, exported: Export) -> None:
    """Write an export atomically: a .safetensors file, or for PEFT a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Several components of a pipeline become folders in that folder. Raises `ValueError` for a path of the wrong kind or not writable.
    """
    path = Path(path)
    check_place(path, exported.target)
    if WRITERS[exported.target].suffix:
        save_adapter_file(path, exported.files[""].tensors, None, exported.metadata)
        return
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        for place, file in exported.files.items():
            save_tensors(beside / place / TENSORS[0], file.tensors, exported.metadata | {"format": "pt"})
            write_text(beside / place / CONFIG, json.dumps(file.config, indent=2) + "\n")
        _replace_folder(beside, path)
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_place(path: Path, target: str) -> None:
    """Raise `ValueError` where the output of a target cannot stand at `path`."""
    is_folder = not writer_named(target).suffix
    if is_folder and (path.suffix == ".safetensors" or path.is_file()):
        raise ValueError(f"{path}: --to {target} writes a folder; give a name without .safetensors, of no file")
    if not is_folder and (path.suffix != ".safetensors" or path.is_dir()):
        raise ValueError(f"{path}: --to {target} writes a file; give a name that ends in .safetensors, of no folder")
    foreign = [str(file.relative_to(path)) for file in path.rglob("*") if not _is_ours(file.relative_to(path), file.is_dir())]
    if foreign:
        raise ValueError(f"{path}: a folder that holds more than one adapter's files ({listing(foreign, 2)}); give another name")


def writer_named(target: str) -> Writer:
    """The writer of a target. Raises `ValueError` for an unknown one."""
    if target not in WRITERS:
        raise ValueError(unknown(target, WRITERS, "target"))
    return WRITERS[target]


def ignored_keys(target: str, keys: Iterable[str], network: Network) -> list[str]:
    """The keys of a file that the target's reader would not use, for a file with adapters of this network's models."""
    return writer_named(target).ignored_keys(keys, network.naming, network.parts)


def narrowed(exported: Export, dtype: torch.dtype) -> Export:
    """The export in a shorter dtype where every number stays what it is; else the export itself."""
    files = {place: _cast(file, dtype) for place, file in exported.files.items()}
    pairs = [(file.tensors[key], tensor) for place, file in files.items() for key, tensor in exported.files[place].tensors.items()]
    return replace(exported, files=files) if all(torch.equal(short.to(tensor), tensor) for short, tensor in pairs) else exported


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a tool reads a file as it is."""

    target: str
    reader: str
    objections: list[str]  # why not; nothing where it does
    hints: list[str]  # what the user has to do for it


@torch.no_grad()
def judged(target: str, keys: Sequence[str], network: Network, is_folder: bool = False) -> Verdict:
    """Whether the target's reader means what a file or PEFT folder says, of which `keys` are the keys and `network` the content.

    Layers of the same structure are judged by one of them.
    """
    writer = writer_named(target)
    ignored = writer.ignored_keys(keys, network.naming, network.parts)
    plan = Plan([Entry(member=member, adapter=member.adapter) for member in _representatives(network.members)])
    writer.rewrite(plan, network.naming, Wishes(), Bases())
    if is_folder == bool(writer.suffix):
        reasons = ["it reads a .safetensors file" if is_folder else "it reads a folder with adapter_config.json", *plan.refused]
        return Verdict(target=target, reader=writer.reader, objections=reasons, hints=[])
    if len(ignored) == len(keys):
        return Verdict(target=target, reader=writer.reader, objections=["it knows none of these names", *plan.refused], hints=[])
    reasons = [*plan.refused, *dict.fromkeys(f"rewriting is needed: {note}" for entry in plan.entries for note in entry.notes)]
    reasons += [f"it ignores {len(ignored)} of {len(keys)} keys, such as {ignored[0]}"] if ignored else []
    lacking = writer.lacking_keys(keys)
    reasons += [f"it fails without {listing(lacking, 1)}"] if lacking else []
    return Verdict(target=target, reader=writer.reader, objections=reasons, hints=[] if reasons else writer.hints(plan.entries))


# Steps


def _settle(plan: Plan, writer: Writer, wishes: Wishes) -> None:
    problems = plan.problems()
    if problems and not (wishes.allow_partial and plan.entries):
        raise ValueError("\n".join(f"--to {writer.name}: {writer.reader} cannot be told {problem}" for problem in problems))
    for problem in problems:
        logger.warning("left out: %s", problem)


def _cast(file: Written, dtype: torch.dtype | None) -> Written:
    """The file as it is stored: contiguous on the CPU in `dtype`. Raises `ValueError` naming tensors that overflow in it."""
    tensors = {}
    for key, tensor in file.tensors.items():
        wanted = torch.float32 if key.endswith(WIDE) else dtype or tensor.dtype
        tensors[key] = tensor.detach().to("cpu", wanted).contiguous()
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors hold values that are not finite in this precision: {listing(broken)}")
    return replace(file, tensors=tensors)


def _metadata(network: Network, entries: Sequence[Entry], writer: Writer, given: Mapping[str, str]) -> dict[str, str]:
    """What the file said, with the structure as it is now; arguments stay only where nothing was rewritten."""
    kept = {key: value for key, value in given.items() if key not in STALE}
    if not writer.has_alpha:
        return {key: value for key, value in kept.items() if key not in STRUCTURE}
    if any(entry.notes for entry in entries):
        kept.pop("ss_network_args", None)
    members = [Member(adapter=entry.adapter, part=entry.member.part, target=entry.member.target) for entry in entries]
    described = kept | structure(Network(members, network.naming, network.parts))
    if arguments := writer.network_arguments(entries):
        described["ss_network_args"] = json.dumps(_object(kept.get("ss_network_args", "")) | arguments)
    if any(entry.magnitudes_moved for entry in entries):
        described |= dict([BASE_NORM_MARK])
    return described


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:  # other tools write what they like
        return {}
    return found if isinstance(found, dict) else {}


def _representatives(members: Sequence[Member]) -> list[Member]:
    """One member of each structure: algorithm, shapes, kind of layer, and whether the family's table lists it."""
    found: dict[tuple, Member] = {}
    for member in members:
        adapter = member.adapter
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in adapter.named_parameters())
        component = member.target.diffusers_path.partition(".")[0]
        key = (type(adapter), type(adapter.layer), adapter.shape.groups, shapes, member.part.prefix, component, bool(member.target.group))
        found.setdefault(key, member)
    return list(found.values())


def _is_ours(path: Path, is_dir: bool) -> bool:
    """Whether a path in a folder is one that an export of PEFT's writes: an adapter's files, or the folders of components with them."""
    folders = path.parts if is_dir else path.parts[:-1]
    return len(folders) <= 1 and set(folders) <= set(COMPONENTS) and (is_dir or path.name in (CONFIG, *TENSORS))


def _replace_folder(beside: Path, path: Path) -> None:
    """Put a finished folder in its place; an earlier one is moved aside first and removed after."""
    old = path.with_name(f".{path.name}.{uuid4().hex[:8]}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(beside, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
