"""The adapters of one model: made from arguments or from a file, attached, trained, merged, saved.

`factory(Algorithm)` gives a module the two functions that sd-scripts expects of a `--network_module`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.core.log import get_logger
from library.core.options import OptionError
from library.core.tensor_file import listing
from library.models.naming import Naming, Part, naming_named, naming_names, naming_of
from networks.base import Adapter, Dropouts
from networks.files import read_adapter_file, save_adapter_file
from networks.formats.kohya import NameTable, by_layer
from networks.members import Member, algorithm_of, read_members
from networks.protocol import TrainableNetwork
from networks.rates import ParameterGroup, parameter_groups
from networks.selection import WHERE, NetworkArguments, parts_of, plan_layers, read_arguments

logger = get_logger(__name__)

DEFAULT_DIM, DEFAULT_ALPHA = 4, 1.0
FROM_FILE = ("conv_dim", "conv_alpha", "factor", "exclude_patterns", "include_patterns", "network_reg_dims")  # a file decides these
Parts = Sequence[tuple[Part, nn.Module]]


class Network(TrainableNetwork):
    """The adapters of one model, registered under their names: `state_dict()` is the content of the file.

    Its parameters are its adapters' only; the base layers are not part of it. `attach` makes it act, `detach` undoes that.
    """

    def __init__(self, members: Iterable[Member], naming: Naming, parts: Parts, arguments: NetworkArguments | None = None) -> None:
        super().__init__()
        self.naming = naming
        self.parts = list(parts)  # a plain list: the base models are not submodules
        self.arguments = arguments or NetworkArguments()
        self.members = list(members)
        for member in self.members:
            self.add_module(member.adapter.name, member.adapter)

    @classmethod
    def from_file(
        cls, file: Path | str, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = (), multiplier: float = 1.0
    ) -> "Network":
        """The network that an adapter file holds, of whatever algorithms, on these models; not attached yet.

        Raises `ValueError` naming keys that these models have no layer for.
        """
        naming = _naming_of(denoiser)
        network = _read(file, None, naming, parts_of(naming, text_encoders, denoiser), NetworkArguments())
        network.set_multiplier(multiplier)
        return network

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters in the order of the family's table."""
        return [member.adapter for member in self.members]

    def attach(self) -> None:
        """Let every adapter add its delta to its layer's output."""
        for adapter in self.adapters:
            adapter.attach()

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for adapter in self.adapters:
            adapter.detach()

    def merge(self, *, keep: bool = True) -> None:
        """Add every delta to its layer's weight; with `keep`, `unmerge` restores the weights bit for bit from copies."""
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
        """Switch all attached adapters on or off."""
        for adapter in self.adapters:
            adapter.enabled = enabled

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
        groups = parameter_groups(self.members, self.arguments, learning_rate, unet_lr, text_encoder_lr)
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

    # Files

    def save_weights(self, file: Path | str, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Write the adapters atomically as safetensors in `dtype` (float32 for None), with metadata and hashes."""
        save_adapter_file(Path(file), self.state_dict(), dtype, metadata)

    def load_weights(self, file: Path | str) -> str:
        """Take over the values of a file that fits this network exactly; returns a sentence for the log.

        Raises `ValueError` naming adapters that only one side has, and tensors that do not fit.
        """
        tensors = read_adapter_file(file)
        try:
            self._load(tensors)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        return f"{len(self.members)} adapters"

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        found, left_out = NameTable(self.naming, self.parts).resolve(by_layer(tensors))
        own = {adapter.name: adapter for adapter in self.adapters}
        foreign = [name for name in [*found, *left_out] if name not in own]
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
            self._load(weights_sd)
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


# Making networks


def factory(algorithm: type[Adapter]) -> tuple[Callable[..., Network], Callable[..., tuple[Network, dict[str, Tensor]]]]:
    """`create_network` and `create_network_from_weights` of one algorithm, with sd-scripts' signatures."""

    def create_network(
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> Network:
        """A new network with a delta of zero. `kwargs` are network arguments; all that is wrong is raised at once (`OptionError`)."""
        dim = DEFAULT_DIM if network_dim is None else network_dim
        alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
        problems = [f"--network_dim {dim}: must be at least 1"] if dim < 1 else []
        problems += [f"--network_alpha {alpha}: must be a number that is not negative"] if not 0 <= alpha < math.inf else []
        naming = _naming_of(unet)
        arguments, dropouts, turned_on = _read_arguments(algorithm, naming, neuron_dropout, kwargs, problems)
        parts = parts_of(naming, _as_list(text_encoder), unet)
        plans = plan_layers(naming, parts, dim=dim, alpha=alpha, arguments=arguments, turned_on=turned_on)
        members = [
            Member(
                adapter=algorithm.fresh(plan.target.name, plan.layer, plan.rank, plan.alpha, arguments), part=plan.part, target=plan.target
            )
            for plan in plans
        ]
        for remark in algorithm.remarks([member.adapter for member in members]):
            logger.warning("%s", remark)
        return _finished(Network(members, naming, parts, arguments), dropouts, multiplier)

    def create_network_from_weights(
        multiplier: float,
        file: Path | str | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> tuple[Network, dict[str, Tensor]]:
        """The network that a file holds, with its values, and its tensors under canonical names.

        Every layer is read by its own algorithm, whichever module was named; one that differs is said. Raises `ValueError`.
        """
        naming = _naming_of(unet)
        arguments, dropouts, _ = _read_arguments(algorithm, naming, neuron_dropout, kwargs, [])
        void = [name for name in FROM_FILE if name in kwargs]
        if void:
            logger.warning("%s %s: without effect, the adapter file decides", WHERE, ", ".join(void))
        network = _read(file, weights_sd, naming, parts_of(naming, _as_list(text_encoder), unet), arguments)
        others = {adapter.title for adapter in network.adapters} - {algorithm.title}
        if others:
            logger.info("%s holds %s, not only %s, and is read as such", file, " and ".join(sorted(others)), algorithm.title)
        network = _finished(network, dropouts, multiplier)
        return network.eval() if for_inference else network, dict(network.state_dict())

    return create_network, create_network_from_weights


def _read_arguments(
    algorithm: type[Adapter], naming: Naming, neuron_dropout: float | None, given: Mapping[str, Any], problems: list[str]
) -> tuple[NetworkArguments, Dropouts, frozenset[str]]:
    """Network arguments, dropouts, and the arguments that turn on groups; raises `OptionError` with `problems` and all others.

    sd-scripts' trainers pass `--network_dropout` twice, as `neuron_dropout` and for LyCORIS as `dropout` among the arguments.
    """
    given = dict(given)
    dropout = given.pop("dropout", None)
    dropout = neuron_dropout if neuron_dropout is not None else dropout
    try:
        neuron = float(dropout or 0)
    except (TypeError, ValueError):
        neuron = math.nan
    if not 0 <= neuron < 1:
        problems.append(f"--network_dropout {dropout}: must be at least 0 and less than 1")
    arguments, turned_on = read_arguments(algorithm.Arguments, given, naming, problems)
    if problems or arguments is None:
        raise OptionError(problems)
    return arguments, Dropouts(neuron=neuron, rank=arguments.rank_dropout, module=arguments.module_dropout), turned_on


def _read(
    file: Path | str | None, tensors: Mapping[str, Tensor] | None, naming: Naming, parts: Parts, arguments: NetworkArguments
) -> Network:
    """The network of a file, or of tensors already read from it."""
    if tensors is None:
        if file is None:
            raise ValueError("neither an adapter file nor its tensors were given")
        tensors = read_adapter_file(file)
    try:
        members = read_members(tensors, NameTable(naming, parts))
    except ValueError as error:
        raise ValueError(f"{file}: {error}" if file is not None else str(error)) from None
    return Network(members, naming, parts, arguments)


def _finished(network: Network, dropouts: Dropouts, multiplier: float) -> Network:
    for adapter in network.adapters:
        adapter.dropouts = dropouts
    network.set_multiplier(multiplier)
    if network.arguments.verbose:
        for member in network.members:
            logger.info("%s: rank %d, alpha %g", member.target.path, member.adapter.rank, float(member.adapter.alpha))
    return network


def _as_list(text_encoder: Any) -> list[nn.Module]:
    if text_encoder is None:
        return []
    return [encoder for encoder in text_encoder if encoder is not None] if isinstance(text_encoder, list | tuple) else [text_encoder]


def _naming_of(denoiser: nn.Module) -> Naming:
    naming = naming_of(denoiser)
    if naming is None:
        titles = ", ".join(naming_named(name).title for name in naming_names())
        raise ValueError(f"a {type(denoiser).__name__} of this structure is no model family that Hadron knows ({titles})")
    return naming
