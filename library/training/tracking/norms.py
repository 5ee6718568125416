"""Norms by kind of layer: where a network learns, and how far it has gone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from library.models.architecture import Architecture, Models
from library.models.naming import Part, Target
from networks.formats.names import NameTable
from networks.selection import parts_of

KINDS = (
    ("modulation", r"modulation|ada_?ln"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feedforward|(^|[._])ffn?([._]|$)"),
    ("resnet", r"resnet"),
    ("sampling", r"downsample|upsample"),
    ("embedding", r"embed"),
    ("projection", r"proj|final_?layer|linear"),
)
"""Kinds of layers, and what finds them in a canonical group and in the path within its container: the first that does counts."""
OTHER = "other"


@dataclass(frozen=True)
class LayerKinds:
    """The trained parameters by the kind of their layers: `unet/attention`, `text_encoder_1/mlp`, ..."""

    network: nn.Module
    paths: Mapping[str, Sequence[str]]  # kind -> paths of parameters in the network; engines may put others in their place

    @classmethod
    def of(cls, network: nn.Module, trained: Sequence[nn.Parameter], arch: Architecture, models: Models) -> "LayerKinds":
        """Found by the names that adapters have in their network, whoever made it; what has no name of a layer is `other`."""
        parts = parts_of(arch, models.text_encoders, models.denoiser)
        kinds, names = _kinds_by_name(arch, parts), NameTable(arch, parts)
        wanted, found = set(map(id, trained)), {}
        for path, parameter in network.named_parameters():
            if id(parameter) in wanted:
                known = filter(None, map(names.canonical, path.split(".")))
                found.setdefault(kinds.get(next(known, ""), OTHER), []).append(path)
        return cls(network, found)

    def weight_norms(self) -> dict[str, Tensor]:
        """The norm of the trained parameters of each kind, by tracker key, on their device."""
        return {f"norm/weight/{kind}": _norm([one.detach() for one in own]) for kind, own in self._parameters()}

    def gradient_norms(self) -> dict[str, Tensor]:
        """The norm of the gradients of each kind, by tracker key, on their device; without kinds that have none."""
        grads = {kind: [one.grad for one in own if one.grad is not None] for kind, own in self._parameters()}
        return {f"norm/gradient/{kind}": _norm(own) for kind, own in grads.items() if own}

    def _parameters(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        every = dict(self.network.named_parameters())
        return ((kind, [every[path] for path in paths]) for kind, paths in self.paths.items())


def kind_of(part: Part, target: Target) -> str:
    """The part of the family and the kind of a layer: `unet/attention`."""
    inside = target.path.removeprefix(target.container).strip(".")
    text = f"{target.group} {inside}".lower()
    kind = next((kind for kind, pattern in KINDS if re.search(pattern, text)), OTHER)
    return f"{part.name.replace(' ', '_')}/{kind}"


def _kinds_by_name(arch: Architecture, parts: Sequence[tuple[Part, nn.Module]]) -> dict[str, str]:
    every = ((part, target) for part, model in parts for target in (*arch.outside(part, model), *arch.targets(part, model)))
    return {target.name: kind_of(part, target) for part, target in every}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm = get_total_norm(tensors).float()
    return cast(Tensor, norm.full_tensor()) if isinstance(norm, DTensor) else norm


def unclipped(norms: Mapping[str, Tensor], total: float | None, limit: float) -> dict[str, Tensor]:
    """Norms as they were before gradients of the norm `total` were clipped to `limit` (0: not at all), as torch clips."""
    factor = 1.0 if total is None or limit <= 0 else max(1.0, (total + 1e-6) / limit)
    return {key: norm * factor for key, norm in norms.items()}
