"""Learning rates of a network: which parameters share one, and what the groups are called."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from networks.members import Member
from networks.selection import WHERE, NetworkArguments, pattern_table


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate; without one the optimizer's own default applies."""

    name: str  # unet, textencoder 1, unet plus, reg_lr_0
    parameters: list[nn.Parameter]
    rate: float | None


def parameter_groups(
    members: Iterable[Member],
    arguments: NetworkArguments,
    learning_rate: float | None,
    unet_lr: float | None = None,
    text_encoder_lr: float | Sequence[float | None] | None = None,
) -> list[ParameterGroup]:
    """The groups in the order of their first parameter, those with rate 0 among them.

    `text_encoder_lr` is one rate for all encoders, or one each. Raises `ValueError` where the number of rates does not fit.
    """
    members = list(members)
    encoders = list(dict.fromkeys(member.part.name for member in members if not member.part.is_denoiser))
    encoder_rates = dict(zip(encoders, spread(text_encoder_lr, len(encoders)), strict=True))
    patterns = pattern_table(arguments.network_reg_lrs, f"{WHERE} network_reg_lrs")
    found: dict[str, ParameterGroup] = {}
    for member in members:
        own, ratio = (unet_lr, _ratio(arguments, denoiser=True))
        name = "unet"
        if not member.part.is_denoiser:
            own, ratio = encoder_rates[member.part.name], _ratio(arguments, denoiser=False)
            name = f"textencoder {encoders.index(member.part.name) + 1}"
        rate = learning_rate if own is None else own
        entry = patterns.first(member.target.path)
        if entry is not None:
            name, rate = f"reg_lr_{patterns.entries.index(entry)}", entry.value
        for key, parameter in member.adapter.named_parameters():
            is_boosted = ratio is not None and key.startswith(member.adapter.boosted)
            full_name = f"{name} plus" if is_boosted else name
            full_rate = rate * ratio if is_boosted and ratio is not None and rate is not None else rate
            found.setdefault(full_name, ParameterGroup(name=full_name, parameters=[], rate=full_rate)).parameters.append(parameter)
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


def _ratio(arguments: NetworkArguments, denoiser: bool) -> float | None:
    own = arguments.loraplus_unet_lr_ratio if denoiser else arguments.loraplus_text_encoder_lr_ratio
    return own if own is not None else arguments.loraplus_lr_ratio
