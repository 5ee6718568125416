"""Making networks: `factory(Algorithm)` gives a module the two functions that sd-scripts expects of a `--network_module`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.core.log import get_logger
from library.core.options import OptionError
from library.models.naming import Naming
from networks.any_model import naming_for
from networks.arguments import FROM_FILE
from networks.base import Adapter
from networks.extras import Dropouts
from networks.kernels.autotune import Tuner
from networks.kernels.choice import Choice
from networks.members import Member
from networks.network import Network, read_network
from networks.selection import WHERE, NetworkArguments, parts_of, plan_layers, read_arguments

logger = get_logger(__name__)

DEFAULT_DIM, DEFAULT_ALPHA = 4, 1.0


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
        encoders = as_list(text_encoder)
        network = new_network(algorithm, unet, encoders, network_dim, network_alpha, neuron_dropout, kwargs)
        network.set_multiplier(multiplier)
        return network

    def create_network_from_weights(
        multiplier: float,
        file: Path | str | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        allow_partial: bool = False,
        **kwargs: Any,
    ) -> tuple[Network, dict[str, Tensor]]:
        """The network that a file holds, with its values, and its tensors under canonical names.

        Every layer is read by its own algorithm, whichever module was named; one that differs is said. Raises `ValueError` for what
        does not fit, which `allow_partial` skips with a warning.
        """
        naming = naming_for(unet, as_list(text_encoder))
        arguments, dropouts = _arguments_beside_a_file(algorithm, naming, neuron_dropout, kwargs)
        parts = parts_of(naming, as_list(text_encoder), unet)
        network = read_network(file, weights_sd, naming, parts, arguments, allow_partial=allow_partial)
        others = {adapter.title for adapter in network.adapters} - {algorithm.title}
        if others:
            logger.info("%s holds %s, not only %s, and is read as such", file, " and ".join(sorted(others)), algorithm.title)
        _finish(network, dropouts)
        network.set_multiplier(multiplier)
        return network.eval() if for_inference else network, dict(network.state_dict())

    return create_network, create_network_from_weights


def new_network(
    algorithm: type[Adapter],
    denoiser: nn.Module,
    text_encoders: list[nn.Module],
    dim: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    given: Mapping[str, Any],
) -> Network:
    """A network of fresh adapters on the layers that the arguments choose. Raises `OptionError` with everything that is wrong."""
    dim = DEFAULT_DIM if dim is None else dim
    alpha = DEFAULT_ALPHA if alpha is None else alpha
    problems = [] if _is_number(dim) and dim == int(dim) >= 1 else [f"--network_dim {dim}: must be a whole number of at least 1"]
    problems += [] if _is_number(alpha) else [f"--network_alpha {alpha}: must be a number that is not negative"]
    naming = naming_for(denoiser, text_encoders)
    arguments, dropouts, turned_on = _read_arguments(algorithm, naming, neuron_dropout, given, problems)
    parts = parts_of(naming, text_encoders, denoiser)
    members = []
    for plan in plan_layers(naming, parts, dim=int(dim), alpha=alpha, arguments=arguments, turned_on=turned_on):
        adapter = algorithm.fresh(plan.target.name, plan.layer, plan.rank, plan.alpha, arguments.at(plan.target))
        members.append(Member(adapter=adapter, part=plan.part, target=plan.target))
    for remark in algorithm.remarks([member.adapter for member in members]):
        logger.warning("%s", remark)
    network = Network(members, naming, parts, arguments)
    _finish(network, dropouts)
    return network


def as_list(text_encoder: Any) -> list[nn.Module]:
    """Text encoders as they are given: none, one, or several with or without gaps."""
    if text_encoder is None:
        return []
    return (
        [encoder for encoder in text_encoder if encoder is not None]
        if isinstance(text_encoder, list | tuple | nn.ModuleList)
        else [text_encoder]
    )


def _arguments_beside_a_file(
    algorithm: type[Adapter], naming: Naming, neuron_dropout: float | None, given: Mapping[str, Any]
) -> tuple[NetworkArguments, Dropouts]:
    """The arguments that matter to a network from a file; those that the file decides are said to be without effect."""
    arguments, dropouts, turned_on = _read_arguments(algorithm, naming, neuron_dropout, given, [])
    void = [*(name for name in FROM_FILE if name in given), *sorted(turned_on)]
    if void:
        logger.warning("%s %s: without effect, the adapter file decides", WHERE, ", ".join(void))
    return arguments, dropouts


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
    arguments, turned_on = read_arguments(algorithm.Arguments, given, naming, problems, algorithm.signature)
    if problems or arguments is None:
        raise OptionError(problems)
    dropouts = Dropouts(neuron=neuron, rank=arguments.rank_dropout, module=arguments.module_dropout, rank_mode=arguments.rank_dropout_mode)
    return arguments, dropouts, turned_on


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def _finish(network: Network, dropouts: Dropouts) -> None:
    tuner = Tuner() if network.arguments.autotune else None
    for adapter in network.adapters:
        adapter.dropouts = dropouts
        adapter.choice = Choice(network.arguments.path, tuner)
        if network.arguments.dora_norm == "full":  # of a file's adapters too: no file says how its norm was trained
            adapter.extras = replace(adapter.extras, full_norm=True)
    if network.arguments.verbose:
        for member in network.members:
            logger.info("%s: rank %d, alpha %g", member.target.path, member.adapter.rank, float(member.adapter.alpha))
