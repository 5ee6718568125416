"""Which layers get an adapter, of which rank and alpha, and at which rate: the family's table narrowed by the network arguments."""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from library.core.options import Given, OptionError, option, read_group
from library.core.spelling import nearest
from library.models.naming import Naming, Part, Target
from networks.layers import LayerShape

WHERE = "--network_args"
LYCORIS = "not supported by Hadron's modules yet; use --network_module lycoris.kohya for it"
BLOCKWISE = (
    "block-wise tables are not supported yet; use network_reg_dims and network_reg_lrs with patterns such as 'input_blocks[.]4[.].*=8'"
)
ELSEWHERE = {
    "algo": "belongs to lycoris.kohya; here the module is the algorithm: --network_module networks.lora, networks.loha or networks.lokr",
    "preset": "belongs to lycoris.kohya; here exclude_patterns, include_patterns and conv_dim choose the layers",
    "dim": "give the rank with --network_dim",
    "alpha": "give it with --network_alpha",
    "network_dim": "give it as --network_dim, not inside --network_args",
    "network_alpha": "give it as --network_alpha, not inside --network_args",
    **dict.fromkeys(
        (
            "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "use_scalar", "rs_lora", "dora_wd", "wd_on_output", "decompose_both",
            "full_matrix", "unbalanced_factorization", "bypass_mode", "train_norm", "rank_dropout_scale", "block_size", "constraint",
            "rescaled",
        ),
        LYCORIS,
    ),
    **dict.fromkeys(
        (
            "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight",
            "block_lr_zero_threshold",
        ),
        BLOCKWISE,
    ),
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class NetworkArguments:
    """Network arguments of every algorithm."""

    conv_dim: int | None = option(None, help="rank of convolutions larger than 1x1, which are adapted only if this is given")
    conv_alpha: float | None = option(None, help="alpha of those convolutions; 1 if not given, 0 means conv_dim")
    rank_dropout: float = option(0.0, help="probability of dropping a rank, per sample")
    module_dropout: float = option(0.0, help="probability of leaving a layer's adapter out of a step")
    exclude_patterns: str | tuple[str, ...] = option(
        (), help="regexes (whole dotted name) of layers to leave alone; a text or a list ['a', 'b']"
    )
    include_patterns: str | tuple[str, ...] = option((), help="regexes of layers to adapt although a pattern excludes them")
    network_reg_dims: dict | str | None = option(None, help="ranks by regex: regex=8,regex2=4; alpha stays, the first match counts")
    network_reg_lrs: dict | str | None = option(None, help="learning rates by regex: regex=1e-4,regex2=0; the first match counts")
    loraplus_lr_ratio: float | None = option(None, help="LoRA+: factor on the rate of each algorithm's boosted factor")
    loraplus_unet_lr_ratio: float | None = option(None, help="the same for the denoiser alone")
    loraplus_text_encoder_lr_ratio: float | None = option(None, help="the same for the text encoders alone")
    verbose: bool = option(False, help="list every adapted layer in the log")

    def check(self) -> Iterable[str]:
        """Everything wrong with the values, one sentence each."""
        if self.conv_dim is not None and self.conv_dim < 1:
            yield f"{WHERE} conv_dim={self.conv_dim}: must be at least 1"
        if self.conv_alpha is not None and self.conv_alpha < 0:
            yield f"{WHERE} conv_alpha={self.conv_alpha}: must not be negative"
        if self.conv_alpha is not None and self.conv_dim is None:
            yield f"{WHERE} conv_alpha={self.conv_alpha}: is without effect unless conv_dim is given too"
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{WHERE} {name}={getattr(self, name)}: must be at least 0 and less than 1"
        for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{WHERE} {name}={value}: must be more than 0"
        yield from self._table_problems()

    def _table_problems(self) -> Iterable[str]:
        for name in ("exclude_patterns", "include_patterns"):
            yield from pattern_list(getattr(self, name), f"{WHERE} {name}").problems
        dims = pattern_table(self.network_reg_dims, f"{WHERE} network_reg_dims")
        yield from dims.problems
        yield from (
            f"{entry.where}: a rank must be a whole number of at least 1 (exclude_patterns leaves layers out)"
            for entry in dims.entries
            if entry.value < 1 or entry.value != int(entry.value)
        )
        rates = pattern_table(self.network_reg_lrs, f"{WHERE} network_reg_lrs")
        yield from rates.problems
        yield from (f"{entry.where}: a learning rate must not be negative" for entry in rates.entries if entry.value < 0)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer that gets an adapter."""

    part: Part
    target: Target
    layer: nn.Module
    rank: int
    alpha: float


# Reading the arguments


def read_arguments(
    kind: type[NetworkArguments], given: Mapping[str, Any], naming: Naming, problems: list[str]
) -> tuple[NetworkArguments | None, frozenset[str]]:
    """The network arguments, and the names among `given` that turn on groups of the family. What is wrong is added to `problems`."""
    switches = {name for part in naming.parts for name in part.extra_groups}
    turned_on = set()
    for name in switches & set(given):
        word = str(given[name]).strip().lower()
        if word not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            problems.append(f"{WHERE} {name}: {given[name]!r} is not true or false")
        elif word in ("true", "1", "yes", "on"):
            turned_on.add(name)
    rest = [Given(name, value, f"{WHERE} {name}") for name, value in given.items() if name not in switches]
    elsewhere = {**ELSEWHERE, "train_llm_adapter": f"{naming.title} has no such layers"}
    try:
        return read_group(kind, rest, what="network argument", elsewhere=elsewhere), frozenset(turned_on)
    except OptionError as error:
        problems += error.problems
        return None, frozenset()


@dataclass(frozen=True)
class Pattern:
    """One regex with its value, where it has one, and its place in the arguments."""

    regex: re.Pattern[str]
    value: float
    where: str

    def matches(self, path: str) -> bool:
        """Whether the whole dotted name fits."""
        return self.regex.fullmatch(path) is not None


@dataclass
class Patterns:
    """The patterns of one argument and what is wrong with the others."""

    entries: list[Pattern] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, text: Any, value: Any, where: str) -> None:
        """Take one pattern, or note why not."""
        try:
            self.entries.append(Pattern(re.compile(text), float(value), f"{where} '{text}'"))
        except re.error as error:
            self.problems.append(f"{where} '{text}': not a regular expression ({error})")
        except (TypeError, ValueError):
            self.problems.append(f"{where} '{text}': {value!r} is not a number")

    def first(self, path: str) -> Pattern | None:
        """The first pattern that matches."""
        return next((entry for entry in self.entries if entry.matches(path)), None)


def pattern_list(value: str | Sequence[str], where: str) -> Patterns:
    """Patterns of `value`: one regex, a list, or the text of a Python list as sd-scripts takes it."""
    patterns = Patterns()
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):  # a regex may begin with a bracket too
            value = (value,)
    for text in [value] if isinstance(value, str) else value:
        patterns.add(text, 0, where)
    return patterns


def pattern_table(value: Mapping[str, Any] | str | None, where: str) -> Patterns:
    """Patterns with numbers, of a table or of `regex=number,regex=number`; a comma or `=` inside a regex does no harm."""
    patterns = Patterns()
    if isinstance(value, str):
        found = list(re.finditer(r"(.+?)=\s*([-+.\w]+)\s*(?:,|$)", value))
        if "".join(match.group() for match in found) != value:
            patterns.problems.append(f"{where} '{value}': must be of the form regex=number,regex=number")
        value = {match.group(1).strip(): match.group(2) for match in found}
    for text, number in (value or {}).items():
        patterns.add(text, number, where)
    return patterns


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
    """The layers to adapt, in the order of the family's tables.

    Raises `OptionError` for every pattern that matches no layer, with the nearest name.
    """
    selection = _Selection(arguments, dim, alpha)
    plans = [plan for part, module in parts for plan in selection.of_part(part, module, naming.targets(part, module), turned_on)]
    problems = selection.unmatched()
    if not plans and not problems:
        problems = [f"{WHERE}: the patterns leave no layer of {naming.title} to adapt"]
    if problems:
        raise OptionError(problems)
    return plans


class _Selection:
    """The network arguments at work, and which of their patterns have matched."""

    def __init__(self, arguments: NetworkArguments, dim: int, alpha: float) -> None:
        self.excludes = pattern_list(arguments.exclude_patterns, f"{WHERE} exclude_patterns")
        self.includes = pattern_list(arguments.include_patterns, f"{WHERE} include_patterns")
        self.dims = pattern_table(arguments.network_reg_dims, f"{WHERE} network_reg_dims")
        self.rates = pattern_table(arguments.network_reg_lrs, f"{WHERE} network_reg_lrs")
        self.arguments, self.dim, self.alpha = arguments, dim, alpha
        self.paths: list[str] = []  # of all candidates, before patterns
        self.idle: dict[str, str] = {}  # path -> group, for layers that no argument has turned on

    def of_part(self, part: Part, module: nn.Module, targets: Sequence[Target], turned_on: frozenset[str]) -> list[LayerPlan]:
        """The plans of one model."""
        groups = set(part.default_groups).union(*(part.extra_groups.get(name, ()) for name in turned_on))
        if self.arguments.conv_dim is not None:
            groups.update(part.conv_groups)
        layers = dict(module.named_modules())
        default_excludes = [re.compile(text) for text in part.default_excludes]
        plans = []
        for target in targets:
            layer = layers[target.module_path]
            is_small = LayerShape.of(layer).is_pointwise
            if target.group not in groups or not (is_small or self.arguments.conv_dim is not None):
                self.idle[target.path] = target.group
                continue
            self.paths.append(target.path)
            excluded = self.excludes.first(target.path) or any(regex.fullmatch(target.path) for regex in default_excludes)
            if not excluded or self.includes.first(target.path):
                plans.append(
                    LayerPlan(part=part, target=target, layer=layer, rank=self._rank(target, is_small), alpha=self._alpha(is_small))
                )
        return plans

    def unmatched(self) -> list[str]:
        """A sentence for every pattern that no candidate fits."""
        entries = [entry for group in (self.excludes, self.includes, self.dims, self.rates) for entry in group.entries]
        return [self._advice(entry) for entry in entries if not any(entry.matches(path) for path in self.paths)]

    def _rank(self, target: Target, is_small: bool) -> int:
        entry = self.dims.first(target.path)
        if entry is not None:
            return int(entry.value)
        return self.dim if is_small else self.arguments.conv_dim or self.dim

    def _alpha(self, is_small: bool) -> float:
        if is_small:
            return self.alpha
        return 1.0 if self.arguments.conv_alpha is None else self.arguments.conv_alpha

    def _advice(self, entry: Pattern) -> str:
        groups = sorted({group for path, group in self.idle.items() if entry.matches(path)})
        if groups:
            return f"{entry.where}: matches only layers of {', '.join(groups)} that are not adapted; conv_dim turns convolutions on"
        plain = re.sub(r"\\(.)|[\^$*+?(){}|\[\]]", r"\1", entry.regex.pattern).strip(".")
        near = nearest(plain, self.paths)
        example = (
            f"did you mean '{near}'?" if near else f"names look like '{self.paths[0]}'" if self.paths else "there are no layers to match"
        )
        return f"{entry.where}: matches no layer (the whole dotted name must fit); {example}"
