"""The trained network of a run: which module makes it, with which rank, from which weights, and on top of which merged ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.core.log import get_logger
from library.core.options import OptionError, option, pairs
from library.models.architecture import Architecture, Models
from library.training.optimizing.optimizer import OptimizerOptions
from networks.network import Network
from networks.protocol import NetworkRequest, TrainableNetwork, argument_problems, build_network, load_network_module

logger = get_logger(__name__)


@dataclass(kw_only=True, frozen=True)
class NetworkOptions:
    """Network."""

    network_module: str = option(
        help="networks.lora, networks.loha, networks.lokr, or any module with the same contract, such as lycoris.kohya"
    )
    network_dim: int | None = option(None, help="rank; 4 where absent")
    network_alpha: float | None = option(None, help="the delta is scaled by alpha / rank; 1 where absent, 0 means alpha = rank")
    network_dropout: float | None = option(None, help="share of the adapters' inputs dropped in training")
    scale_weight_norms: float | None = option(None, help="after every step, shrink deltas whose Frobenius norm is above this to it")
    network_args: tuple[str, ...] = option((), help="arguments of the network module as key=value, for example conv_dim=8")
    network_weights: str | None = option(None, help="adapter file to start from; every key must fit")
    dim_from_weights: bool = option(False, help="take ranks and layers from --network_weights instead of --network_dim")
    allow_partial: bool = option(
        False, help="use what fits of --base_weights and of --dim_from_weights' file and say what does not, instead of refusing the file"
    )
    base_weights: tuple[str, ...] = option((), help="adapter files merged into the base before training")
    base_weights_multiplier: tuple[float, ...] = option((), help="strengths of --base_weights, 1.0 where absent")
    network_train_unet_only: bool = option(False, help="adapt the denoiser only")
    network_train_text_encoder_only: bool = option(False, help="adapt the text encoders only")

    def check(self) -> Iterable[str]:
        """What is wrong: ranks and dropouts out of range, contradictions."""
        if self.network_dim is not None and self.network_dim < 1:
            yield f"--network_dim {self.network_dim}: must be at least 1"
        if self.network_alpha is not None and self.network_alpha < 0:
            yield f"--network_alpha {self.network_alpha}: must not be negative"
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            yield f"--network_dropout {self.network_dropout}: must lie in [0, 1)"
        if self.scale_weight_norms is not None and not self.scale_weight_norms > 0:
            yield f"--scale_weight_norms {self.scale_weight_norms}: must be more than 0"
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield "--network_train_unet_only and --network_train_text_encoder_only exclude each other"
        if self.dim_from_weights and self.network_weights is None:
            yield "--dim_from_weights needs --network_weights"
        if self.allow_partial and not (self.dim_from_weights or self.base_weights):
            yield "--allow_partial has no effect without --dim_from_weights or --base_weights"
        if len(self.base_weights_multiplier) > len(self.base_weights):
            yield f"--base_weights_multiplier has {len(self.base_weights_multiplier)} values for {len(self.base_weights)} --base_weights"


@dataclass(kw_only=True)
class TrainedNetwork:
    """The network on its models, and what the optimizer gets of it."""

    network: TrainableNetwork
    models: Models
    groups: list[dict[str, Any]]
    group_names: list[str]
    trains_text_encoders: bool

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: exactly the optimizer's parameters, so that clipping sees nothing else."""
        return [parameter for group in self.groups for parameter in group["params"]]


def check_network_arguments(arch: Architecture, options: NetworkOptions) -> None:
    """Raises `OptionError` with all that is wrong with the module and its arguments, before any model is loaded."""
    arguments = {given.name: given.value for given in pairs(options.network_args, "--network_args")}
    problems = argument_problems(load_network_module(options.network_module), arguments, arch)
    if problems:
        raise OptionError(problems)
    groups = (name for part in arch.parts if part.is_denoiser for name in part.extra_groups if name in arguments)
    for name in groups if options.network_train_text_encoder_only else ():
        logger.warning("--network_args %s has no effect: --network_train_text_encoder_only leaves the denoiser alone", name)


def build_trained_network(models: Models, options: NetworkOptions, optimizer: OptimizerOptions, *, text_is_cached: bool) -> TrainedNetwork:
    """Make the network, attach it and read its parameter groups. Raises `ValueError` for what does not fit."""
    module = load_network_module(options.network_module)
    arguments = {given.name: given.value for given in pairs(options.network_args, "--network_args")}
    trains_text = not (options.network_train_unet_only or text_is_cached or _all_zero(optimizer.text_encoder_lr))
    request = NetworkRequest(
        models=models,
        dim=options.network_dim,
        alpha=options.network_alpha,
        dropout=options.network_dropout,
        arguments=arguments,
        weights=options.network_weights if options.dim_from_weights else None,
        allow_partial=options.allow_partial,
    )
    network = build_network(module, request)
    if options.scale_weight_norms is not None and not network.bounds_norms:
        raise ValueError(f"--scale_weight_norms: {options.network_module} cannot bound the norms of its deltas; leave it out")
    network.apply_to(models.text_encoders, models.denoiser, trains_text, not options.network_train_text_encoder_only)
    if options.network_weights is not None and not options.dim_from_weights:
        logger.info("--network_weights %s: %s", options.network_weights, network.load_weights(options.network_weights))
    logger.info("%s", network.summary())
    network.prepare_grad_etc(models.text_encoders, models.denoiser)
    rates = optimizer.text_encoder_lr or None
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(rates, optimizer.unet_lr, optimizer.learning_rate)
    return TrainedNetwork(network=network, models=models, groups=groups, group_names=names, trains_text_encoders=trains_text)


def merge_base_weights(models: Models, options: NetworkOptions) -> None:
    """Merge `--base_weights` into the models, whatever algorithm each file holds."""
    missing = len(options.base_weights) - len(options.base_weights_multiplier)
    for file, strength in zip(options.base_weights, options.base_weights_multiplier + (1.0,) * missing, strict=True):
        network = Network.from_file(file, models.denoiser, models.text_encoders, strength, allow_partial=options.allow_partial)
        network.merge(keep=False)
        logger.info("merged %s at %g: %s", file, strength, network.summary())


def _all_zero(rates: tuple[float, ...]) -> bool:
    return bool(rates) and not any(rates)
