"""The networks of a generation run: loaded, applied or merged, with strengths that may change from picture to picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from library.core.log import get_logger
from library.core.options import option, pairs
from library.inference.prompts import infinite
from library.models.architecture import Models
from networks.network import Network
from networks.protocol import NetworkRequest, TrainableNetwork, build_network, load_network_module

logger = get_logger(__name__)


@dataclass(kw_only=True, frozen=True)
class NetworkFileOptions:
    """Networks."""

    network_module: tuple[str, ...] = option((), help="module of each network: networks.lora, networks.loha, networks.lokr")
    network_weights: tuple[str, ...] = option((), help="adapter file of each network")
    network_mul: tuple[float, ...] = option((), help="strength of each network, 1.0 where absent")
    network_args: tuple[str, ...] = option((), help="arguments of each network module as key=value, separated by ;")
    allow_partial: bool = option(False, help="use what fits of an adapter file and say what does not, instead of refusing the file")
    network_merge: bool = option(False, help="merge the networks into the model once instead of applying them in every step")

    def check(self) -> Iterable[str]:
        """What is wrong: lists of different lengths, infinite strengths."""
        yield from infinite(self, ("network_mul",))
        count = len(self.network_weights)
        if len(self.network_module) != count and not (len(self.network_module) == 1 and count > 1):
            yield f"--network_module has {len(self.network_module)} values for {count} --network_weights; give one for all or one each"
        for name in ("network_mul", "network_args"):
            if len(getattr(self, name)) > count:
                yield f"--{name} has {len(getattr(self, name))} values for {count} --network_weights"

    def strengths(self) -> tuple[float, ...]:
        """One strength a network."""
        return self.network_mul + (1.0,) * (len(self.network_weights) - len(self.network_mul))


@dataclass(kw_only=True)
class AttachedNetworks:
    """Networks on their models; without a network where they were merged."""

    files: tuple[str, ...]
    networks: Sequence[TrainableNetwork]
    strengths: tuple[float, ...]

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Set the strength of every network. Raises `ValueError` for another strength of merged ones."""
        if not self.networks and tuple(strengths) != self.strengths:
            raise ValueError("--am: merged networks have a fixed strength; leave out --network_merge")
        for network, strength in zip(self.networks, strengths, strict=False):
            network.set_multiplier(strength)


def attach_networks(models: Models, options: NetworkFileOptions) -> AttachedNetworks:
    """Load every network file and apply it, or merge it with `--network_merge`. Raises `ValueError` for a file that does not fit."""
    files, strengths = options.network_weights, options.strengths()
    modules = options.network_module * (len(files) if len(options.network_module) == 1 else 1)
    arguments = options.network_args + ("",) * (len(files) - len(options.network_args))
    networks: list[TrainableNetwork] = []
    for module, file, strength, texts in zip(modules, files, strengths, arguments, strict=True):
        given = {pair.name: pair.value for pair in pairs((text for text in texts.split(";") if text), "--network_args")}
        request = NetworkRequest(models=models, arguments=given, multiplier=strength, weights=file, allow_partial=options.allow_partial)
        network = build_network(load_network_module(module), request)
        network.eval().to(next(models.denoiser.parameters()).device)
        if options.network_merge:
            _merge(network, module)
        else:
            network.apply_to(models.text_encoders, models.denoiser)
            networks.append(network)
        logger.info("%s %s at %g: %s", "merged" if options.network_merge else "applied", file, strength, network.summary())
    return AttachedNetworks(files=files, networks=networks, strengths=strengths)


def _merge(network: TrainableNetwork, module: str) -> None:
    if not isinstance(network, Network):
        raise ValueError(
            f"--network_merge: {module} cannot be merged here; leave it out, or name one of networks.lora, networks.loha, networks.lokr"
        )
    network.merge(keep=False)
