"""Which layers get an adapter, of which rank and alpha: the family's table, or the layers named, narrowed by the network arguments."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.core.log import get_logger
from library.core.options import Given, OptionError, convert, declared, read_group
from library.core.spelling import nearest
from library.models.naming import Naming, Part, Target, group_switches
from networks import blocks
from networks.any_model import AnyModel, chosen_by, found_in, is_adaptable
from networks.arguments import FOR_CONVOLUTIONS, PATTERN_LISTS, WHERE, NetworkArguments, advice, boosted_by, unaliased
from networks.blocks import BlockTables
from networks.layers import LayerShape
from networks.patterns import Pattern

__all__ = ["WHERE", "LayerPlan", "NetworkArguments", "parts_of", "plan_layers", "read_arguments"]

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer that gets an adapter; the scale of its delta is alpha/rank, whatever the arguments call it."""

    part: Part
    target: Target
    layer: nn.Module
    rank: int
    alpha: float


# Reading the arguments


def read_arguments(
    kind: type[NetworkArguments], given: Mapping[str, Any], naming: Naming, problems: list[str], signature: Iterable[str] = ()
) -> tuple[NetworkArguments | None, frozenset[str]]:
    """The network arguments, and the names among `given` that turn on groups of the family. What is wrong is added to `problems`.

    `signature` are the parameter names of the algorithm, for arguments that name some of them.
    """
    switches = {name for part in naming.parts for name in part.extra_groups}
    turned_on = {name for name in switches & set(given) if _is_on(name, given[name], problems)}
    rest, doubles = unaliased(
        Given(name, value, f"{WHERE} {name}") for name, value in given.items() if name not in switches and value is not None
    )
    problems += doubles
    elsewhere = {**advice(rest), **dict.fromkeys(group_switches(), f"{naming.title} has no such layers")}
    arguments = None
    try:
        arguments = read_group(kind, rest, what="network argument", elsewhere=elsewhere)
    except OptionError as error:
        problems += error.problems
    understood = arguments or _understood(kind, rest)
    problems += blocks.problems(understood, naming)
    chooses = bool(understood.patterns("target_modules").entries)
    if understood.adapts_convolutions and not chooses and not any(part.conv_groups for part in naming.parts):
        given_names = [item.name for item in rest if item.name in FOR_CONVOLUTIONS]
        problems += [f"{WHERE} {name}: {naming.title} has no convolutions to adapt; leave it out" for name in given_names]
    if chooses:
        problems += [f"{WHERE} {name}: is without effect beside target_modules, which names the layers" for name in sorted(turned_on)]
    if signature:
        problems += boosted_by(understood, signature)[1]
    return arguments, frozenset(turned_on)


def _is_on(name: str, value: Any, problems: list[str]) -> bool:
    try:
        return convert(value, bool, f"{WHERE} {name}")
    except OptionError as error:
        problems += error.problems
        return False


def _understood(kind: type[NetworkArguments], given: Iterable[Given]) -> NetworkArguments:
    """The arguments that can be read at all: among those whose values are wrong, the family has more to say."""
    options = {entry.name: entry for entry in declared(kind)}
    values = {}
    for item in given:
        if item.name in options:
            try:
                values[item.name] = convert(item.value, options[item.name].kind, item.where)
            except OptionError:  # said already
                continue
    return kind(**values)


# Choosing the layers


def parts_of(naming: Naming, text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> list[tuple[Part, nn.Module]]:
    """The family's parts with the models at hand, denoiser first; text encoders that were not given are left out."""
    encoders = iter(text_encoders)
    pairs = [(part, denoiser if part.is_denoiser else next(encoders, None)) for part in naming.parts]
    surplus = list(encoders)
    if surplus:
        raise ValueError(f"{len(text_encoders)} text encoders were given; {naming.title} has {len(text_encoders) - len(surplus)}")
    return [(part, module) for part, module in pairs if module is not None]


def plan_layers(
    naming: Naming,
    parts: Sequence[tuple[Part, nn.Module]],
    *,
    dim: int,
    alpha: float,
    arguments: NetworkArguments,
    turned_on: frozenset[str] = frozenset(),
) -> list[LayerPlan]:
    """The layers to adapt, part by part in the order of the family's tables, those outside the tables behind them.

    Raises `OptionError` for every pattern that matches no layer, with the nearest name; for a model of no family without
    `target_modules`, with what there is to choose from.
    """
    selection = _Selection(arguments, dim, alpha)
    if isinstance(naming, AnyModel) and not selection.chosen:
        raise OptionError([found_in(parts, naming.title)])
    plans = [plan for part, module in parts for plan in selection.of_part(naming, part, module, turned_on)]
    problems = selection.unmatched() or _shared_names(plans)
    if not plans and not problems:
        what = f"patterns and {', '.join(blocks.given_names(arguments))}" if blocks.given_names(arguments) else "patterns"
        problems = [f"{WHERE}: the {what} leave no layer of {naming.title} to adapt"]
    if problems:
        raise OptionError(problems)
    void = [name for name in FOR_CONVOLUTIONS if getattr(arguments, name) not in (None, False)]
    if void and all(LayerShape.of(plan.layer).is_pointwise for plan in plans):
        logger.warning("%s %s: without effect, since no convolution larger than 1x1 is adapted", WHERE, ", ".join(void))
    return plans


@dataclass(frozen=True)
class _Candidate:
    """A layer that would be adapted if no pattern left it out."""

    target: Target
    layer: nn.Module
    is_small: bool  # Linear, or a convolution with kernel 1

    @property
    def paths(self) -> tuple[str, str]:
        return self.target.path, self.target.module_path


class _Selection:
    """The network arguments at work, and the layers that they were held against."""

    def __init__(self, arguments: NetworkArguments, dim: int, alpha: float) -> None:
        self.arguments, self.dim, self.alpha = arguments, dim, alpha
        self.chosen = arguments.patterns("target_modules").entries
        self.used: set[Pattern] = set()  # of target_modules
        self.paths: list[tuple[str, str]] = []  # of all candidates
        self.unchosen: list[tuple[str, str]] = []  # paths of the other layers, where target_modules chooses
        self.idle: dict[tuple[str, str], tuple[Part, str]] = {}  # paths -> group, for layers that no argument has turned on
        self.models: list[tuple[Naming, Part, nn.Module]] = []

    def of_part(self, naming: Naming, part: Part, module: nn.Module, turned_on: frozenset[str]) -> list[LayerPlan]:
        """The plans of one model."""
        self.models.append((naming, part, module))
        candidates = self._chosen(naming, part, module) if self.chosen else self._default(naming, part, module, turned_on)
        self.paths += [candidate.paths for candidate in candidates]
        defaults = [] if self.chosen else [re.compile(text) for text in part.default_excludes]
        tables = BlockTables.of(self.arguments, part)
        plans = []
        for candidate in candidates:
            is_default = not any(regex.fullmatch(candidate.target.path) for regex in defaults)
            rank = self._rank(candidate, tables) if self._is_wanted(candidate, is_default) else 0
            if rank and self._learns(candidate, tables):
                alpha = self._alpha(candidate, tables)
                if self.arguments.rs_lora:
                    alpha = (alpha or rank) * math.sqrt(rank)  # every reader of a file divides by the rank
                plans.append(LayerPlan(part=part, target=candidate.target, layer=candidate.layer, rank=rank, alpha=alpha))
        return plans

    def unmatched(self) -> list[str]:
        """A sentence for every pattern that no candidate fits."""
        names = [name for name in (*PATTERN_LISTS, *self.arguments.tables) if name != "target_modules"]
        entries = [entry for name in names for entry in self.arguments.patterns(name).entries]
        absent = [entry for entry in self.chosen if entry not in self.used]
        return [
            *(self._advice_on_choice(entry) for entry in absent),
            *(self._advice(entry) for entry in entries if not any(entry.matches(*paths) for paths in self.paths)),
        ]

    # Candidates

    def _default(self, naming: Naming, part: Part, module: nn.Module, turned_on: frozenset[str]) -> list[_Candidate]:
        """The layers of the table whose groups are adapted."""
        layers = dict(module.named_modules())
        groups = set(part.default_groups).union(*(part.extra_groups.get(name, ()) for name in turned_on))
        if self.arguments.adapts_convolutions:
            groups.update(part.conv_groups)
        found = []
        for target in naming.targets(part, module):
            layer = layers[target.module_path]
            candidate = _Candidate(target, layer, LayerShape.of(layer).is_pointwise)
            if target.group in groups and (candidate.is_small or self.arguments.adapts_convolutions):
                found.append(candidate)
            else:
                self.idle[candidate.paths] = (part, target.group)
        return found

    def _chosen(self, naming: Naming, part: Part, module: nn.Module) -> list[_Candidate]:
        """The layers that target_modules names, whether the table lists them or not."""
        layers = dict(module.named_modules())
        outside = [target for target in naming.outside(part, module) if is_adaptable(layers[target.module_path])]
        found = []
        for target in (*naming.targets(part, module), *outside):
            layer = layers[target.module_path]
            entries = chosen_by(self.chosen, target, layer)
            self.used.update(entries)
            if entries:
                found.append(_Candidate(target, layer, LayerShape.of(layer).is_pointwise))
            else:
                self.unchosen.append((target.path, target.module_path))
        return found

    def _is_wanted(self, candidate: _Candidate, is_default: bool) -> bool:
        only, excludes, includes = (self.arguments.patterns(name) for name in ("only_patterns", "exclude_patterns", "include_patterns"))
        if only.entries and not only.first(*candidate.paths):
            return False
        return bool((is_default and not excludes.first(*candidate.paths)) or includes.first(*candidate.paths))

    def _learns(self, candidate: _Candidate, tables: BlockTables | None) -> bool:
        """Whether the rate is not zero by block, or given by a pattern."""
        factor = tables.factor(candidate.target) if tables else None
        return factor != 0 or self.arguments.patterns("network_reg_lrs").first(*candidate.paths) is not None

    # Values: a pattern counts before the block, the block before the general value

    def _rank(self, candidate: _Candidate, tables: BlockTables | None) -> int:
        entry = self.arguments.patterns("network_reg_dims").first(*candidate.paths)
        if entry is not None:
            return int(entry.value)
        rank = tables.rank(candidate.target, candidate.is_small) if tables else None
        if rank is not None:
            return rank
        return self.dim if candidate.is_small else self.arguments.conv_dim or self.dim

    def _alpha(self, candidate: _Candidate, tables: BlockTables | None) -> float:
        entry = self.arguments.patterns("network_reg_alphas").first(*candidate.paths)
        if entry is not None:
            return entry.value
        alpha = tables.alpha(candidate.target, candidate.is_small) if tables else None
        if alpha is not None:
            return alpha
        if candidate.is_small or (self.arguments.conv_alpha is None and not self.arguments.adapts_convolutions):
            return self.alpha
        return 1.0 if self.arguments.conv_alpha is None else self.arguments.conv_alpha

    # Advice

    def _advice(self, entry: Pattern) -> str:
        """What to say of a pattern that no candidate fits: why the layers it fits are none, or a name that is near."""
        idle = [where for paths, where in self.idle.items() if entry.matches(*paths)]
        if idle:
            groups = ", ".join(sorted({group for _, group in idle}))
            return f"{entry.where}: matches only layers of {groups} that are not adapted; {_switch(idle)}"
        if any(entry.matches(*paths) for paths in self.unchosen):
            return f"{entry.where}: matches only layers that target_modules does not choose"
        outside = next((path for path, other in self._outside() if entry.matches(path, other)), None)
        if outside is not None:
            return (
                f"{entry.where}: matches only layers that are not adapted by default, such as '{outside}'; target_modules takes any layer"
            )
        canonical, others = [path for path, _ in self.paths], [path for _, path in self.paths]
        near = nearest(_plain(entry.regex.pattern), dict.fromkeys([*canonical, *others]))
        return f"{entry.where}: matches no layer (the whole dotted name must fit); {_example(near, canonical)}"

    def _outside(self) -> Iterator[tuple[str, str]]:
        """The layers that the family's tables do not list; none where target_modules chooses from all."""
        for naming, part, module in [] if self.chosen else self.models:
            for target in naming.outside(part, module):
                if is_adaptable(module.get_submodule(target.module_path)):
                    yield target.path, target.module_path

    def _advice_on_choice(self, entry: Pattern) -> str:
        paths = [path for path, _ in (*self.unchosen, *self.paths)]
        ends = dict.fromkeys(".".join(path.split(".")[-count:]) for path in paths for count in (1, 2))
        near = nearest(_plain(entry.regex.pattern), [*ends, *paths])
        return f"{entry.where}: is the end of no Linear or Conv layer's name, and no regex that fits one; {_example(near, paths)}"


def _shared_names(plans: Iterable[LayerPlan]) -> list[str]:
    """`a.b_c` and `a_b.c` would be one entry of a file."""
    owners: dict[str, str] = {}
    problems = []
    for plan in plans:
        other = owners.setdefault(plan.target.name, plan.target.path)
        if other != plan.target.path:
            problems.append(f"'{other}' and '{plan.target.path}' would both be named {plan.target.name} in a file; exclude one of them")
    return problems


def _plain(regex: str) -> str:
    """A regex without its special characters, as a name to look near."""
    return re.sub(r"\\(.)|[\^$*+?(){}|\[\]]", r"\1", regex).strip(".")


def _example(near: str | None, paths: Sequence[str]) -> str:
    if near is not None:
        return f"did you mean '{near}'?"
    return f"names look like '{paths[0]}'" if paths else "there are no layers to match"


def _switch(idle: Iterable[tuple[Part, str]]) -> str:
    """What would turn these groups on."""
    switches = {name for part, group in idle for name, groups in part.extra_groups.items() if group in groups}
    return " or ".join(f"{name}=True turns them on" for name in sorted(switches)) or "conv_dim turns convolutions on"
