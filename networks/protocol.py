"""What a trainer asks of any `--network_module`: ours, or one with sd-scripts' contract such as the real `lycoris.kohya`.

module = load_network_module(options.network_module)
network = build_network(module, NetworkRequest(models=models, dim=32, alpha=16.0, arguments={"conv_dim": "8"}))
network.apply_to(models.text_encoders, models.denoiser, trains_text_encoders, trains_denoiser)
groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_rates, unet_rate, rate)
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.core.atomic import staged
from library.core.log import get_logger
from library.core.spelling import nearest
from library.core.tensor_file import listing
from library.models.architecture import Models
from library.models.naming import Naming, naming_of, network_aliases
from networks.canonical_view import canonical_view
from networks.members import algorithms
from networks.rates import spread
from networks.selection import parts_of, read_arguments

logger = get_logger(__name__)


class TrainableNetwork(nn.Module, ABC):
    """A network as trainers use it, with sd-scripts' method names; its parameters are what is trained."""

    @abstractmethod
    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach to the models; adapters of parts that are not applied are dropped, neither trained nor saved."""

    @abstractmethod
    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength."""

    @abstractmethod
    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float | None] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups as optimizers take them, without those of rate 0, and their names."""

    @abstractmethod
    def save_weights(self, file: Path | str, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Write an adapter file atomically, in `dtype` (as trained for None)."""

    @abstractmethod
    def load_weights(self, file: Path | str) -> str:
        """Take over the values of a file; returns a sentence for the log. Raises `ValueError` for what does not fit."""

    @abstractmethod
    def summary(self) -> str:
        """What there is, for a log line."""

    @property
    def bounds_norms(self) -> bool:
        """Whether there is an `apply_max_norm_regularization`."""
        return True

    @abstractmethod
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Shrink deltas to a Frobenius norm; returns how many were shrunk, and mean and maximum of the norms after it."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The parameters that are not frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """The base recomputes its blocks; adapters run inside them."""

    def prepare_grad_etc(self, *models: Any) -> None:
        """The optimizer is ready."""

    def ways_taken(self) -> Mapping[str, int]:
        """In how many layers each way to a delta was taken for the last inputs; empty for networks that have one only."""
        return {}

    def on_epoch_start(self, *models: Any) -> None:
        """An epoch begins: training mode, dropouts act."""
        self.train()

    def on_step_start(self) -> None:
        """A step begins."""


@dataclass(frozen=True, kw_only=True)
class NetworkRequest:
    """What a user asked of a network module; `weights` makes the network that a file holds (`--dim_from_weights`)."""

    models: Models
    dim: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # --network_args by name
    multiplier: float = 1.0
    weights: Path | str | None = None
    allow_partial: bool = False  # skip what does not fit of `weights`, with a warning


def load_network_module(name: str) -> ModuleType:
    """The module that `--network_module` names, also by the names of sd-scripts for it.

    Raises `ValueError` with the nearest of ours, or what the module lacks.
    """
    try:
        module = importlib.import_module(network_aliases().get(name, name))
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"--network_module {name}: it needs the package '{error.name}', which is not installed") from error
        near = nearest(name, [*network_modules(), *network_aliases()])
        advice = (
            f"did you mean '{near}'?"
            if near
            else f"there are {', '.join(network_modules())}, and any installed module with the same contract"
        )
        raise ValueError(f"--network_module {name}: no such module; {advice}") from error
    if not callable(getattr(module, "create_network", None)):
        raise ValueError(f"--network_module {name}: has no create_network; there are {', '.join(network_modules())}")
    return module


def network_modules() -> list[str]:
    """The names of our own network modules: those of the algorithms."""
    return sorted(algorithm.__module__ for algorithm in algorithms())


def argument_problems(module: ModuleType, arguments: Mapping[str, Any], naming: Naming) -> list[str]:
    """What is wrong with network arguments, as far as it shows without the models; nothing is known of third-party modules'."""
    algorithm = next((algorithm for algorithm in algorithms() if algorithm.__module__ == module.__name__), None)
    problems: list[str] = []
    if algorithm is not None:
        given = {name: value for name, value in arguments.items() if name != "dropout"}
        read_arguments(algorithm.Arguments, given, naming, problems, algorithm.signature)
    return problems


def build_network(module: ModuleType, request: NetworkRequest) -> TrainableNetwork:
    """The network that a module makes for a request, not applied yet.

    A third-party module sees the models under their canonical names, so that its files are as from sd-scripts, and its network is
    wrapped once: defaults for methods that it lacks, atomic saving.
    """
    models = request.models
    is_ours = module.__name__ in network_modules()
    text_encoders, denoiser = (models.text_encoders, models.denoiser) if is_ours else _views(models)
    places = {"vae": models.vae, "text_encoder": text_encoders, "unet": denoiser}
    dropout = {"neuron_dropout": request.dropout} | ({} if is_ours else {"dropout": request.dropout})  # LyCORIS reads the second
    given: dict[str, Any] = {name: value for name, value in dropout.items() if name not in request.arguments}
    if request.weights is not None:
        if request.allow_partial and not is_ours:
            raise ValueError(f"--allow_partial: {module.__name__} reads its files itself; leave it out")
        given |= {"allow_partial": True} if request.allow_partial else {}
        create = module.create_network_from_weights
        network, _ = create(request.multiplier, str(request.weights), **places, **_accepted(create, given), **request.arguments)
    else:
        create = module.create_network
        alpha = 1.0 if request.alpha is None else request.alpha  # LyCORIS cannot take None
        network = create(request.multiplier, request.dim, alpha, **places, **_accepted(create, given), **request.arguments)
    return network if isinstance(network, TrainableNetwork) else ForeignNetwork(network, from_file=request.weights)


class ForeignNetwork(TrainableNetwork):
    """A third-party network behind our contract."""

    def __init__(self, network: nn.Module, from_file: Path | str | None = None) -> None:
        super().__init__()
        self.network: Any = network
        self._file = from_file

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach as the network does, and take over the values of the file that it was made from."""
        self._call("apply_to", text_encoder, unet, apply_text_encoder, apply_unet)
        if self._file is not None:
            self.load_weights(self._file)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength; without a method for it, on every adapter."""
        if hasattr(self.network, "set_multiplier"):
            self._call("set_multiplier", multiplier)
            return
        for adapter in self._adapters():
            adapter.multiplier = multiplier

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float | None] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Groups and names. Raises `ValueError` for two text encoder rates where the network takes one."""
        method = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if method is not None:
            return _groups(method(text_encoder_lr, unet_lr, default_lr))
        rates = set(spread(text_encoder_lr, 2))
        if len(rates) > 1:
            raise ValueError(f"--text_encoder_lr: {type(self.network).__name__} takes one rate for all text encoders")
        method = self.network.prepare_optimizer_params
        rate = rates.pop()
        values = [default_lr if rate is None else rate, default_lr if unet_lr is None else unet_lr, default_lr]
        return _groups(method(*values[: len(inspect.signature(method).parameters)]))

    @property
    def bounds_norms(self) -> bool:
        """Whether the network can: LyCORIS' can."""
        return hasattr(self.network, "apply_max_norm_regularization")

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Passed on."""
        shrunk, mean, largest = self.network.apply_max_norm_regularization(max_norm_value, device)
        return int(shrunk), float(mean), float(largest)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """What the network says, or every parameter with a gradient."""
        return [p for p in self._call("get_trainable_params", default=self.network.parameters()) if p.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """Passed on."""
        self._call("enable_gradient_checkpointing")

    def prepare_grad_etc(self, *models: Any) -> None:
        """Passed on."""
        self._call("prepare_grad_etc", *models)

    def on_epoch_start(self, *models: Any) -> None:
        """Passed on; in training mode either way."""
        self.train()
        self._call("on_epoch_start", *models)

    def on_step_start(self) -> None:
        """Passed on."""
        self._call("on_step_start")

    def save_weights(self, file: Path | str, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Saved by the network itself, then moved into place: a full disk leaves the earlier file whole."""
        try:
            with staged(file) as beside:
                written = beside.with_suffix(Path(file).suffix)  # networks choose the format by the ending
                try:
                    self.network.save_weights(str(written), dtype, dict(metadata or {}))
                    written.replace(beside)
                finally:
                    written.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"{file}: could not be written ({error.strerror or error}); an earlier file of that name is untouched"
            ) from error

    def load_weights(self, file: Path | str) -> str:
        """Passed on. Raises `ValueError` for keys that the network has no use for."""
        answer = self.network.load_weights(str(file))
        unused = answer.get("unexpected keys", []) if isinstance(answer, dict) else getattr(answer, "unexpected_keys", [])
        if unused:
            raise ValueError(f"{file}: {type(self.network).__name__} has no use for {listing(unused)}")
        return str(answer)

    def summary(self) -> str:
        """The network's class, adapters and parameters."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self.network).__name__}: {len(self._adapters())} layers; {count:,} parameters"

    def _adapters(self) -> list[Any]:
        return [*getattr(self.network, "unet_loras", []), *getattr(self.network, "text_encoder_loras", [])]

    def _call(self, method: str, *arguments: Any, default: Any = None) -> Any:
        found = getattr(self.network, method, None)
        return default if found is None else found(*arguments)


def _views(models: Models) -> tuple[list[nn.Module], nn.Module]:
    """The text encoders and the denoiser as the original checkpoint names their layers."""
    naming = naming_of(models.denoiser)
    assert naming is not None, "models come from a family"
    views = [(part, canonical_view(naming, part, model)) for part, model in parts_of(naming, models.text_encoders, models.denoiser)]
    return [view for part, view in views if not part.is_denoiser], next(view for part, view in views if part.is_denoiser)


def _accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a function takes, by name or by `**kwargs`."""
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in given.items() if takes_any or name in parameters}


def _groups(answer: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups and names, for networks that give only groups or iterators of parameters; frozen groups have no place in it."""
    groups, names = answer if isinstance(answer, tuple) else (answer, None)
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not groups:
        raise ValueError("nothing to train: every learning rate is 0")
    return groups, list(names or (f"group {index}" for index in range(len(groups))))
