"""Learning rates of a network: which parameters share one, and what the groups are called.

The rate of an adapter is that of the first pattern of network_reg_lrs that fits its layer, else the rate of its part times the factor
of its block. LoRA+ multiplies either for some of its parameters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from library.core.log import get_logger
from networks.arguments import WHERE, NetworkArguments, boosted_by
from networks.blocks import BlockTables
from networks.members import Member

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate; without one the optimizer's own default applies."""

    name: str  # unet, unet block 4, textencoder 1, unet plus, reg_lr_0
    parameters: list[nn.Parameter]
    rate: float | None


def parameter_groups(
    members: Iterable[Member],
    arguments: NetworkArguments,
    learning_rate: float | None,
    unet_lr: float | None = None,
    text_encoder_lr: float | Sequence[float | None] | None = None,
    *,
    encoders: Sequence[str] = (),
) -> list[ParameterGroup]:
    """The groups in the order of their first parameter, those with rate 0 among them.

    `text_encoder_lr` is one rate for all encoders, or one each: of `encoders`, the names of the model's text encoders, of which some may
    have no adapter. Raises `ValueError` where the number of rates does not fit, where a
    factor has no rate to act on, and where loraplus_targets names nothing that is there.
    """
    members = list(members)
    adapted = dict.fromkeys(member.part.name for member in members if not member.part.is_denoiser)
    own_rates = _rates_of_encoders(list(dict.fromkeys((*encoders, *adapted))) if adapted else [], learning_rate, text_encoder_lr)
    rates = _Rates(members, arguments, learning_rate if unet_lr is None else unet_lr, own_rates)
    boosts = _Boosts(members, arguments)
    found: dict[str, ParameterGroup] = {}
    for member in members:
        name, rate = rates.of(member)
        boosted = boosts.of(member)
        for key, parameter in member.adapter.named_parameters():
            full_name, full_rate = (f"{name} plus", multiplied(rate, boosted[key], "LoRA+")) if key in boosted else (name, rate)
            found.setdefault(full_name, ParameterGroup(name=full_name, parameters=[], rate=full_rate)).parameters.append(parameter)
    boosts.report()
    return list(found.values())


def spread(rates: float | Sequence[float | None] | None, count: int) -> list[float | None]:
    """One rate for each of `count` text encoders. Raises `ValueError` where several were given, but another number."""
    if rates is None or isinstance(rates, int | float):
        return [rates] * count
    if len(rates) <= 1:
        return [rates[0] if rates else None] * count
    if count and len(rates) != count:
        raise ValueError(f"--text_encoder_lr: {len(rates)} rates for {count} text encoders; give one for all, or one each")
    return list(rates)[:count]


def multiplied(rate: float | None, factor: float, what: str) -> float | None:
    """A rate times a factor. Raises `ValueError` for a factor on the optimizer's own default, which nobody here knows."""
    if rate is None and factor not in (0, 1):
        raise ValueError(
            f"{what} multiplies a learning rate by {factor:g}; give the rate with --learning_rate, --unet_lr or --text_encoder_lr"
        )
    return 0.0 if factor == 0 else rate if rate is None else rate * factor


class _Rates:
    """The name and rate of each adapter before LoRA+."""

    def __init__(
        self,
        members: Sequence[Member],
        arguments: NetworkArguments,
        unet_lr: float | None,
        encoders: Mapping[str, tuple[str, float | None]],
    ) -> None:
        self._encoders = encoders
        self._denoiser = ("unet", unet_lr)
        self._tables = next((BlockTables.of(arguments, member.part) for member in members if member.part.is_denoiser), None)
        self._patterns = arguments.patterns("network_reg_lrs")
        for entry in self._patterns.entries:
            if not any(entry.matches(member.target.path, member.target.module_path) for member in members):
                logger.warning("%s: there is no adapter that it matches", entry.where)

    def of(self, member: Member) -> tuple[str, float | None]:
        entry = self._patterns.first(member.target.path, member.target.module_path)
        if entry is not None:
            return f"reg_lr_{self._patterns.entries.index(entry)}", entry.value
        if not member.part.is_denoiser:
            return self._encoders[member.part.name]
        name, rate = self._denoiser
        factor = self._tables.factor(member.target) if self._tables else None
        if self._tables is None or factor is None:
            return name, rate
        return f"{name} block {self._tables.blocks.number(member.target.path)}", multiplied(rate, factor, "a block's *_lr_weight")


def _rates_of_encoders(
    encoders: Sequence[str], learning_rate: float | None, given: float | Sequence[float | None] | None
) -> dict[str, tuple[str, float | None]]:
    """Text encoder -> the name and the rate of its group, numbered as the model has them."""
    own = spread(given, len(encoders))
    return {
        name: (f"textencoder {number + 1}", learning_rate if rate is None else rate)
        for number, (name, rate) in enumerate(zip(encoders, own, strict=True))
    }


class _Boosts:
    """The parameters whose rate LoRA+ multiplies, and by how much."""

    def __init__(self, members: Sequence[Member], arguments: NetworkArguments) -> None:
        """Raises `ValueError` for names in loraplus_targets that no algorithm at hand knows."""
        signature = dict.fromkeys(key for member in members for key in member.adapter.signature)
        self._named, problems = boosted_by(arguments, signature)
        if problems:
            raise ValueError("; ".join(problems))
        self._arguments = arguments
        self._seen: dict[tuple[str, float], dict[str, None]] = {}  # (model, ratio) -> parameter names, in order

    def of(self, member: Member) -> Mapping[str, float]:
        """Parameter name -> ratio, for one adapter."""
        ratio = self._ratio(member.part.is_denoiser)
        if ratio is None:
            return {}
        names = [name for name, _ in member.adapter.named_parameters()]
        keys = [name for name in names if (name in self._named if self._named else name.startswith(member.adapter.boosted))]
        seen = self._seen.setdefault(("the denoiser" if member.part.is_denoiser else "the text encoders", ratio), {})
        seen.update(dict.fromkeys(key.removesuffix(".weight") for key in keys))
        return dict.fromkeys(keys, ratio)

    def report(self) -> None:
        """Say what is boosted. Raises `ValueError` where loraplus_targets has met nothing."""
        for (where, ratio), names in self._seen.items():
            if not names:
                targets = ", ".join(self._arguments.loraplus_targets)
                raise ValueError(f"{WHERE} loraplus_targets: no adapter of {where} has {targets} in the form it is made in here")
            logger.info("LoRA+: %s of %s at %g times the learning rate", ", ".join(names), where, ratio)

    def _ratio(self, denoiser: bool) -> float | None:
        arguments = self._arguments
        own = arguments.loraplus_unet_lr_ratio if denoiser else arguments.loraplus_text_encoder_lr_ratio
        return own if own is not None else arguments.loraplus_lr_ratio
