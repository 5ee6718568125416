"""The weights of single layers, read from a checkpoint when they are needed: for DoRA, extraction and merging no model is loaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.core.tensor_file import listing
from library.core.tensor_stream import DTYPES, TensorReader
from library.models.naming import Naming, Part, Place, Target, naming_named, naming_names
from networks.layers import LayerShape
from networks.members import Member
from networks.network import Network

Parts = Sequence[tuple[Part, nn.Module]]
VARIANTS = ("", ".fp16", ".bf16", ".fp32")  # of the weights in a diffusers folder, the wanted ones first
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv", "scaled_fp8", ".absmax", ".quant_map")  # marks of scaled or packed weights


class CheckpointTensors:
    """The tensors of a family's layers in a checkpoint, a single file or a diffusers folder, each read when asked for.

    `parts` are models, on any device, whose targets will be asked for; by default the outline that the checkpoint describes.
    Raises `ValueError` for broken files and for weights that are quantised with scales of their own.
    """

    def __init__(self, path: Path | str, naming: Naming, parts: Parts | None = None) -> None:
        self.path = Path(path)
        self.files = [(prefix, TensorReader(file)) for prefix, file in _files(self.path)]
        self._readers = {prefix + name: (reader, name) for prefix, reader in self.files for name in reader.header.tensors}
        scaled = [key for key in self._readers if key.endswith(SCALES)]
        if scaled:
            raise ValueError(f"{path}: holds quantised weights with scales of their own ({listing(scaled, 2)}); give the unquantised model")
        parts = naming.outline(self.path) if parts is None else parts
        self._places = {part.prefix: naming.places(part, module) for part, module in parts}

    def close(self) -> None:
        """Close the files."""
        for _, reader in self.files:
            reader.close()

    def place(self, part: Part, target: Target, leaf: str = "weight") -> Place | None:
        """Where this checkpoint has a target's `weight` or `bias`, or None."""
        place = self._places.get(part.prefix, {}).get(f"{target.module_path}.{leaf}")
        places = (place, *place.others) if place else ()
        return next((place for place in places if place.key in self._readers), None)

    def has(self, part: Part, target: Target) -> bool:
        """Whether the checkpoint has the weight of this target."""
        return self.place(part, target) is not None

    def shape(self, place: Place) -> tuple[int, ...]:
        """The shape of the tensor at `place` as the model sees it."""
        reader, name = self._readers[place.key]
        return tuple(place.view(torch.empty(reader.header.tensors[name].shape, device="meta")).shape)

    def dtype(self, place: Place) -> torch.dtype:
        """The dtype of the tensor at `place`."""
        reader, name = self._readers[place.key]
        return DTYPES[reader.header.tensors[name].dtype]

    def weight(self, part: Part, target: Target) -> Tensor:
        """The weight of a target in its stored dtype. Raises `ValueError` where the checkpoint has none."""
        return self._tensor(part, target, "weight")

    def bias(self, part: Part, target: Target) -> Tensor:
        """The bias of a target in its stored dtype. Raises `ValueError` where the checkpoint has none."""
        return self._tensor(part, target, "bias")

    def _tensor(self, part: Part, target: Target, leaf: str) -> Tensor:
        place = self.place(part, target, leaf)
        if place is None:
            raise ValueError(f"{self.path}: has no {leaf} for {target.name}")
        reader, name = self._readers[place.key]
        return place.view(reader.read(name)).contiguous()


def fill_layers(network: Network | Sequence[Member], checkpoint: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Give the layers of these members, which may be on the meta device, their weights and biases from a checkpoint.

    Raises `ValueError` naming the file and every layer that it lacks or has in another shape, before the first is read.
    """
    members = network.members if isinstance(network, Network) else network
    naming, parts = (network.naming, network.parts) if isinstance(network, Network) else (naming_of_parts(members), None)
    tensors = CheckpointTensors(checkpoint, naming, parts)
    try:
        check_layers(members, tensors)
        for member in members:
            layer: Any = member.adapter.layer
            layer.weight = _frozen(tensors.weight(member.part, member.target), dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias = _frozen(tensors.bias(member.part, member.target), dtype)
    finally:
        tensors.close()


def check_layers(members: Iterable[Member], tensors: CheckpointTensors) -> None:
    """Raise `ValueError` naming every layer of the members that the checkpoint lacks, or has in another shape or as whole numbers."""
    problems: list[str] = []
    lacking = [member.target.name for member in members if not tensors.has(member.part, member.target)]
    if lacking:
        problems.append(f"{tensors.path}: lacks {len(lacking)} of the adapted layers: {listing(lacking)}")
    for member in members:
        place = tensors.place(member.part, member.target)
        wanted = weight_shape(member.adapter.layer)
        if place is None:
            continue
        if tensors.shape(place) != wanted:
            problems.append(f"{tensors.path}: '{place.key}' has the shape {list(tensors.shape(place))}; {list(wanted)} was expected")
        if not tensors.dtype(place).is_floating_point:
            problems.append(f"{tensors.path}: '{place.key}' holds whole numbers ({tensors.dtype(place)}): a packed weight")
    if problems:
        raise ValueError("\n".join(problems))


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, read where there is one to see: packed and missing weights have the shape of their layer."""
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.is_floating_point() else LayerShape.of(layer).weight


def naming_of_parts(members: Sequence[Member]) -> Naming:
    """The naming that the parts of these members are of."""
    part = members[0].part
    return next(naming for naming in map(naming_named, naming_names()) if any(own is part for own in naming.parts))


def _frozen(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype), requires_grad=False)


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files of a checkpoint, each with what stands before its keys: nothing, or the folder of a diffusers component.

    A folder without components may hold single files that belong together.
    """
    if not path.is_dir():
        return [("", path)]
    files = [(f"{folder.name}/", file) for folder in sorted(path.iterdir()) if folder.is_dir() for file in _weight_files(folder)]
    files = files or [("", file) for file in sorted(path.glob("*.safetensors"))]
    if not files:
        raise ValueError(f"{path}: a folder without safetensors files; give a .safetensors file, a folder of them or a diffusers folder")
    return files


def _weight_files(folder: Path) -> list[Path]:
    """The weights of one component: one file or its shards, of the first variant there is."""
    for variant in VARIANTS:
        files = [file for file in sorted(folder.glob("*.safetensors")) if _variant(file) == variant]
        if files:
            return files
    return []


def _variant(file: Path) -> str:
    """`.fp16` of model.fp16.safetensors, model-00001-of-00002.fp16.safetensors or model.fp16-00001-of-00002.safetensors."""
    stem = file.name.removesuffix(".safetensors")
    return next((variant for variant in VARIANTS[1:] if variant in stem), "")
