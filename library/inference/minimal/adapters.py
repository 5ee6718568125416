"""Adapter files on the models: merged for good, or attached to act in every step."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from library.core.log import get_logger
from library.core.options import OptionError
from library.inference.minimal.options import AdapterOptions
from networks.base import Adapter
from networks.members import Member
from networks.network import Network
from networks.patterns import Patterns, pattern_list
from networks.stack import check_merge, stack_of

logger = get_logger(__name__)


def read_networks(options: AdapterOptions, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> list[Network]:
    """The networks of all files at their strengths, each adapter where its layer is; neither merged nor attached.

    Raises `ValueError` for a file that does not fit, and for patterns that are none or choose nothing.
    """
    choice = _Choice(options)
    networks = []
    for file, strength in zip(options.lora_weight, options.strengths, strict=True):
        network = Network.from_file(file, denoiser, text_encoders, strength, allow_partial=options.allow_partial)
        network = Network(choice.of(network.members, file), network.naming, network.parts).eval().requires_grad_(False)
        for adapter in network.adapters:
            adapter.to(cast(Tensor, adapter.layer.weight).device)
        logger.info("%s at %g: %s", file, strength, network.summary())
        networks.append(network)
    choice.check()
    return networks


@torch.no_grad()
def merge_for_good(networks: Sequence[Network]) -> None:
    """Add all networks to the weights: summed in float32 and rounded once, however many change a layer.

    Raises `ValueError` for a layer that cannot be merged into, before any weight is changed.
    """
    layers: dict[nn.Module, list[Adapter]] = {}
    for adapter in (adapter for network in networks for adapter in network.adapters):
        check_merge(adapter, keep=False)
        layers.setdefault(adapter.layer, []).append(adapter)
    for layer, adapters in layers.items():
        for adapter in adapters:
            adapter.merge(keep=len(adapters) > 1)  # from the kept weight each merge writes the whole sum anew
        stack_of(layer).kept = None


class _Choice:
    """The layers that `--include_patterns` and `--exclude_patterns` leave to adapter files."""

    def __init__(self, options: AdapterOptions) -> None:
        """Raises `OptionError` for what is no regular expression."""
        self._included = pattern_list(options.include_patterns, "--include_patterns")
        self._excluded = pattern_list(options.exclude_patterns, "--exclude_patterns")
        self._unused = {entry.where for entry in (*self._included.entries, *self._excluded.entries)}
        self._examples: list[str] = []
        if self._included.problems or self._excluded.problems:
            raise OptionError(self._included.problems + self._excluded.problems)

    def of(self, members: Sequence[Member], file: str) -> list[Member]:
        """The members of a file's network that are left. Raises `ValueError` where none is."""
        self._examples += [members[0].target.path] if members else []
        kept = [member for member in members if self._keeps(member)]
        if not kept:
            names = f"its layers have names such as {members[0].target.path}"
            raise ValueError(f"{file}: --include_patterns and --exclude_patterns leave nothing of it; {names}")
        if len(kept) < len(members):
            logger.info("%s: the patterns leave %d of its %d adapters", file, len(kept), len(members))
        return kept

    def check(self) -> None:
        """Raises `OptionError` for patterns that matched no layer of any file."""
        example = next(iter(self._examples), "")
        if self._unused:
            raise OptionError(
                f"{where}: matches no layer of the adapter files, whose names are like {example}" for where in sorted(self._unused)
            )

    def _keeps(self, member: Member) -> bool:
        included, excluded = self._matches(self._included, member), self._matches(self._excluded, member)
        return (included or not self._included.entries) and not excluded

    def _matches(self, patterns: Patterns, member: Member) -> bool:
        found = [entry for entry in patterns.entries if entry.matches(member.target.path, member.target.module_path)]
        self._unused -= {entry.where for entry in found}
        return bool(found)
