"""The adapters of one model: attached, trained, merged, saved as one. `factory.py` makes them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.core.log import get_logger
from library.core.tensor_file import listing
from library.models.naming import Naming, Part
from networks.any_model import naming_for
from networks.base import Adapter
from networks.files import AdapterFile, read_adapter_file, save_adapter_file
from networks.formats.names import NameTable
from networks.formats.reader import algorithm_of, read_layers, read_members, settle_magnitudes
from networks.members import Member
from networks.protocol import TrainableNetwork
from networks.rates import ParameterGroup, parameter_groups
from networks.selection import NetworkArguments, parts_of
from networks.stack import attached_to, check_merge

logger = get_logger(__name__)

Parts = Sequence[tuple[Part, nn.Module]]


class Network(TrainableNetwork):
    """The adapters of one model, registered under their names: `state_dict()` is the content of the file.

    Its parameters are its adapters' only; the base layers are not part of it. `attach` makes it act, `detach` undoes that.
    """

    def __init__(
        self,
        members: Iterable[Member],
        naming: Naming,
        parts: Parts,
        arguments: NetworkArguments | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.naming = naming
        self.parts = list(parts)  # a plain list: the base models are not submodules
        self._marks: list[Any] = []  # handles of `_pass`
        self.arguments = arguments or NetworkArguments()
        self.members = list(members)
        for member in self.members:
            self.add_module(member.adapter.name, member.adapter)
        self.rename(name)

    @classmethod
    def from_file(
        cls,
        file: Path | str,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module] = (),
        multiplier: float = 1.0,
        *,
        allow_partial: bool = False,
    ) -> "Network":
        """The network that an adapter file or PEFT folder holds, of whatever tool and algorithms, on these models; not attached yet.

        Raises `ValueError` naming what these models have no place for; with `allow_partial` it is skipped, and said in one warning.
        """
        naming = naming_for(denoiser, text_encoders)
        network = read_network(
            file, None, naming, parts_of(naming, text_encoders, denoiser), NetworkArguments(), allow_partial=allow_partial
        )
        network.set_multiplier(multiplier)
        return network

    def rename(self, name: str | None) -> None:
        """Give the network the name by which `networks.set_adapters` switches it."""
        self.name = name
        for adapter in self.adapters:
            adapter.network_name = name

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters in the order of the family's table."""
        return [member.adapter for member in self.members]

    def attach(self) -> None:
        """Let every adapter add its delta to its layer's output. Raises `ValueError` where another network of this name does."""
        if self.name is not None and any(self._is_taken(adapter) for adapter in self.adapters):
            raise ValueError(f"a network named '{self.name}' is attached to this model already; give this one another name, or detach that")
        for adapter in self.adapters:
            adapter.attach()
        if not self._marks:
            blocks = [block for _, model in self.parts for block in model.modules() if _bypasses_layers(block)]
            self._marks = [block.register_forward_pre_hook(_pass) for block in blocks]

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for adapter in self.adapters:
            adapter.detach()
        for mark in self._marks:
            mark.remove()
        self._marks = []

    def merge(self, *, keep: bool = True) -> None:
        """Add every delta to its layer's weight; with `keep`, `unmerge` restores the weights bit for bit from copies.

        Raises `ValueError` for a layer that cannot be merged into, before any weight is changed.
        """
        for adapter in self.adapters:
            if not adapter.is_merged:
                check_merge(adapter, keep)
        for adapter in self.adapters:
            adapter.merge(keep=keep)

    def unmerge(self) -> None:
        """Take every delta out of the weights again."""
        for adapter in self.adapters:
            adapter.unmerge()

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of all adapters. Raises `ValueError` while they are merged into the weights."""
        if any(adapter.is_merged for adapter in self.adapters):
            raise ValueError("the strength of a merged network is fixed; unmerge it first")
        for adapter in self.adapters:
            adapter.multiplier = float(multiplier)

    def set_enabled(self, enabled: bool) -> None:
        """Switch all attached adapters on or off. Raises `ValueError` while they are merged into the weights."""
        if any(adapter.is_merged for adapter in self.adapters):
            raise ValueError("a merged network cannot be switched; unmerge it first")
        for adapter in self.adapters:
            adapter.enabled = enabled

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Shrink every trained delta whose Frobenius norm is above `max_norm_value` to it (`--scale_weight_norms`).

        Returns how many were shrunk, and mean and maximum of the norms after it. `device` is of sd-scripts' signature; not needed.
        """
        trained = [adapter for adapter in self.adapters if any(factor.requires_grad for factor in adapter.factors().values())]
        norms = torch.stack([adapter.delta_norm() for adapter in trained]).tolist()  # one wait for the device, not one a layer
        for adapter, norm in zip(trained, norms, strict=True):
            if norm > max_norm_value:
                adapter.shrink(max_norm_value / norm)
        kept = [min(norm, max_norm_value) for norm in norms]
        return sum(norm > max_norm_value for norm in norms), sum(kept) / len(kept), max(kept)

    def keep_parts(self, *, denoiser: bool, text_encoders: bool) -> None:
        """Drop the adapters of parts that are not wanted: they are neither trained nor saved. Raises `ValueError` if none remain."""
        dropped = [member for member in self.members if not (denoiser if member.part.is_denoiser else text_encoders)]
        if dropped and len(dropped) == len(self.members):
            raise ValueError("no adapters remain: the network has none for the parts that shall be trained")
        for member in dropped:
            member.adapter.detach()
            delattr(self, member.adapter.name)
        self.members = [member for member in self.members if member not in dropped]

    def parameter_groups(
        self,
        learning_rate: float | None,
        unet_lr: float | None = None,
        text_encoder_lr: float | Sequence[float | None] | None = None,
    ) -> list[ParameterGroup]:
        """The parameters to train by learning rate. Groups of rate 0 are frozen, which is said, and left out.

        Raises `ValueError` when nothing is left.
        """
        encoders = [part.name for part, _ in self.parts if not part.is_denoiser]
        groups = parameter_groups(self.members, self.arguments, learning_rate, unet_lr, text_encoder_lr, encoders=encoders)
        for group in groups:
            for parameter in group.parameters:
                parameter.requires_grad_(group.rate != 0)
        frozen = [group.name for group in groups if group.rate == 0]
        if frozen:
            logger.info("frozen, because their learning rate is 0: %s", ", ".join(frozen))
        if len(frozen) == len(groups):
            raise ValueError("nothing to train: every learning rate is 0 (--learning_rate, --unet_lr, --text_encoder_lr, network_reg_lrs)")
        return [group for group in groups if group.rate != 0]

    def summary(self) -> str:
        """What there is, for a log line: algorithms, layers by part, parameters."""
        algorithms = " and ".join(dict.fromkeys(adapter.title for adapter in self.adapters))
        layers = ", ".join(f"{count} layers of {part}" for part, count in Counter(member.part.name for member in self.members).items())
        return f"{algorithms}: {layers}; {sum(parameter.numel() for parameter in self.parameters()):,} parameters"

    def ways_taken(self) -> Counter[str]:
        """How often each way to a delta was taken for the last inputs, by algorithm and way."""
        return Counter(f"{adapter.title} {adapter.choice.taken}" for adapter in self.adapters if adapter.choice.taken is not None)

    # Files

    def save_weights(self, file: Path | str, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Write the adapters atomically as safetensors in `dtype` (float32 for None), with metadata and hashes."""
        save_adapter_file(Path(file), self.file_tensors(), dtype, metadata)

    def file_tensors(self) -> dict[str, Tensor]:
        """The content of a file: `state_dict()` with learned scalars folded into factors."""
        return {f"{adapter.name}.{key}": tensor for adapter in self.adapters for key, tensor in adapter.file_tensors().items()}

    def load_weights(self, file: Path | str) -> str:
        """Take over the values of a file that fits this network exactly; returns a sentence for the log.

        Raises `ValueError` naming adapters that only one side has, and tensors that do not fit.
        """
        source = read_adapter_file(file)
        try:
            self._load(source)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        return f"{len(self.members)} adapters"

    def _load(self, file: AdapterFile) -> None:
        found = read_layers(file, NameTable(self.naming, self.parts))
        own = {adapter.name: adapter for adapter in self.adapters}
        foreign = [name for name in found if name not in own]
        absent = [name for name in own if name not in found]
        if foreign or absent:
            sides = [f"adapts {listing(foreign, 4)}, which the network does not"] if foreign else []
            sides += [f"has nothing for {listing(absent, 4)}"] if absent else []
            raise ValueError(f"it {', and '.join(sides)}; --dim_from_weights makes the network that the file holds")
        kinds = {algorithm_of(name, found[name]).title for name in own}
        if kinds - {adapter.title for adapter in own.values()}:
            titles = " and ".join(sorted(kinds))
            raise ValueError(f"it holds {titles}; name its module as --network_module, or let --dim_from_weights make what the file holds")
        for name, adapter in own.items():
            adapter.load(found[name])
        settle_magnitudes(file, own.values())

    def _is_taken(self, adapter: Adapter) -> bool:
        return any(other is not adapter and other.network_name == self.name for other in attached_to(adapter.layer))

    # The contract of sd-scripts' trainers

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach, after dropping the adapters of parts that are not applied. The models were bound when the network was made."""
        self.keep_parts(denoiser=apply_unet, text_encoders=apply_text_encoder)
        self.attach()

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works."""
        return True

    def merge_to(
        self, text_encoder: Any, unet: Any, weights_sd: Mapping[str, Tensor] | None, dtype: Any = None, device: Any = None
    ) -> None:
        """Merge for good, without a copy to go back to: computed on `device` in float32, rounded once to each weight's dtype."""
        if weights_sd:
            self._load(AdapterFile(tensors=weights_sd))
        if device is not None:
            self.to(device)
        self.merge(keep=False)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float | None] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The groups as optimizers take them, and their names."""
        groups = self.parameter_groups(default_lr, unet_lr, text_encoder_lr)
        rates = [{} if group.rate is None else {"lr": group.rate} for group in groups]
        return [{"params": group.parameters, **rate} for group, rate in zip(groups, rates, strict=True)], [group.name for group in groups]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None = None, unet_lr: float | None = None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same for one rate of all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)


def _bypasses_layers(block: nn.Module) -> bool:
    """Whether torch may compute a block from the weights of its layers, past their forward; where the block has a hook, it does not."""
    return isinstance(block, nn.TransformerEncoderLayer)


def _pass(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


def read_network(
    file: Path | str | None,
    tensors: Mapping[str, Tensor] | None,
    naming: Naming,
    parts: Parts,
    arguments: NetworkArguments,
    *,
    allow_partial: bool = False,
) -> Network:
    """The network of a file, or of tensors already read from it. Raises `ValueError` naming the file and what does not fit."""
    if tensors is not None:
        source = AdapterFile(tensors=tensors, path=None if file is None else Path(file))
    elif file is not None:
        source = read_adapter_file(file)
    else:
        raise ValueError("neither an adapter file nor its tensors were given")
    return Network(read_members(source, naming, parts, allow_partial=allow_partial), naming, parts, arguments)
