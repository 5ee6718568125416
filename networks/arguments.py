"""The network arguments of every algorithm: what `--network_args` may hold, what is wrong with it, and what to use instead."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from library.core.options import Given, option
from library.core.spelling import nearest
from library.models.naming import Target
from networks.kernels.cost import Path
from networks.patterns import Patterns, pattern_list, pattern_table

WHERE = "--network_args"

ALIASES = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker", "weight_decompose": "dora_wd"}
"""LyCORIS' other spellings of what there is here."""

RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
PATTERN_LISTS = ("target_modules", "only_patterns", "exclude_patterns", "include_patterns")
LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
FOR_CONVOLUTIONS = ("conv_dim", "conv_alpha", "use_tucker", "conv_block_dims", "conv_block_alphas")
NOT_NEGATIVE = (
    "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", *LR_WEIGHTS, "block_lr_zero_threshold"
)  # fmt: skip
FROM_FILE = (
    "conv_dim", "conv_alpha", "use_tucker", "use_scalar", "rs_lora", "dora_wd", "wd_on_output", "exclude_patterns", "include_patterns",
    "only_patterns", "target_modules", "network_reg_dims", "network_reg_alphas", "block_dims", "block_alphas", "conv_block_dims",
    "conv_block_alphas", "factor", "decompose_both", "full_matrix", "unbalanced_factorization", "network_reg_factors", *ALIASES,
)  # fmt: skip
"""Arguments that an adapter file decides, once there is one."""

_LYCORIS = "not an algorithm of Hadron's modules; use --network_module lycoris.kohya for it"
_LOKR = "an argument of LoKr alone: --network_module networks.lokr"
_CHOICE = "target_modules, only_patterns and exclude_patterns choose the layers, conv_dim adds convolutions"
ELSEWHERE = {
    "algo": "here the module is the algorithm: --network_module networks.lora, networks.loha or networks.lokr",
    "preset": f"belongs to lycoris.kohya; here {_CHOICE}",
    "dim": "give the rank with --network_dim",
    "alpha": "give it with --network_alpha",
    "network_dim": "give it as --network_dim, not inside --network_args",
    "network_alpha": "give it as --network_alpha, not inside --network_args",
    "network_dropout": "give it as --network_dropout, not inside --network_args",
    "disable_conv_cp": "leave it out, or turn Tucker cores on with use_tucker=True",
    "bypass_mode": "leave it out: the delta's path is always separate here, which is what bypass_mode asks for",
    "rank_dropout_scale": "leave it out: what rank_dropout keeps is always scaled by 1/(1-p)",
    "train_norm": "normalisation layers get no adapter here; use --network_module lycoris.kohya for them",
    "unit": "belongs to DyLoRA, which is not among Hadron's modules",
    **dict.fromkeys(("block_size", "constraint", "rescaled", "constrain"), _LYCORIS),
    **dict.fromkeys(("factor", "decompose_both", "full_matrix", "unbalanced_factorization", "network_reg_factors"), _LOKR),
    # as PEFT spells it
    "r": "give the rank with --network_dim",
    "lora_alpha": "give it with --network_alpha",
    "use_rslora": "is spelled rs_lora here",
    "use_dora": "is spelled dora_wd here",
    "use_effective_conv2d": "is spelled use_tucker here",
    "rank_pattern": "is spelled network_reg_dims here",
    "alpha_pattern": "is spelled network_reg_alphas here",
    "exclude_modules": "is spelled exclude_patterns here, and takes regexes of whole dotted names",
}
"""Names of other tools that are no argument here, and what to use instead."""

_BLOCKS = "of each block of the denoiser, as many as it has"


@dataclass(kw_only=True, frozen=True)
class NetworkArguments:
    """Network arguments of every algorithm. Text forms are those of sd-scripts and LyCORIS."""

    tables: ClassVar[tuple[str, ...]] = ("network_reg_dims", "network_reg_alphas", "network_reg_lrs")  # fields with numbers by regex

    conv_dim: int | None = option(
        None, help="rank of convolutions larger than 1x1, which a family adapts only if this is given; with target_modules else network_dim"
    )
    conv_alpha: float | None = option(
        None, help="alpha of those convolutions; 1 if not given, with target_modules and no conv_dim network_alpha; 0 means their rank"
    )
    use_tucker: bool = option(False, help="store those convolutions as Tucker cores (also spelled use_cp, use_conv_cp)")
    use_scalar: bool = option(False, help="learn one more factor on each delta, which starts at zero in place of a matrix")
    rs_lora: bool = option(False, help="rank-stabilised: scale deltas by alpha/sqrt(rank) instead of alpha/rank")
    dora_wd: bool = option(False, help="DoRA: learn the magnitude of the changed weights apart from their direction")
    wd_on_output: bool = option(True, help="DoRA: one magnitude for each output of a layer; False: for each input")
    dora_norm: Literal["detached", "full"] = option(
        "detached", help="DoRA: whether gradients flow through the norm; detached as in the paper, full as in LyCORIS"
    )
    rank_dropout: float = option(0.0, help="probability of dropping a rank, per sample")
    rank_dropout_mode: Literal["rank", "rows"] = option(
        "rank",
        help="what rank_dropout drops: ranks, or rows of the delta (outputs of the layer) as LyCORIS and sd-scripts do for LoHa and LoKr",
    )
    module_dropout: float = option(0.0, help="probability of leaving a layer's adapter out of a step")
    target_modules: str | tuple[str, ...] = option(
        (),
        help="the layers to adapt, in any model, instead of the family's own choice: ['to_q', 'to_k'] (dotted names or their ends) or "
        "regexes; all-linear takes every Linear. Convolutions that match need no conv_dim; the pattern arguments narrow the choice",
    )
    exclude_patterns: str | tuple[str, ...] = option(
        (), help="regexes (whole dotted name) of layers to leave alone; a text or a list ['a', 'b']"
    )
    include_patterns: str | tuple[str, ...] = option((), help="regexes of layers to adapt although a pattern excludes them")
    only_patterns: str | tuple[str, ...] = option((), help="regexes: of the layers that would be adapted, only those that match are")
    network_reg_dims: dict | str | None = option(
        None, help="ranks by regex: regex=8,regex2=4, a table {'regex': 8}, or a .json or .toml file with one; the first match counts"
    )
    network_reg_alphas: dict | str | None = option(None, help="alphas by regex, in the same forms; without a match alpha stays as it is")
    network_reg_lrs: dict | str | None = option(None, help="learning rates by regex, in the same forms; 0 freezes")
    block_dims: tuple[int, ...] | None = option(None, help=f"ranks {_BLOCKS}; 0: no adapter there. A match in network_reg_dims wins")
    block_alphas: tuple[float, ...] | None = option(None, help=f"alphas {_BLOCKS}; network_alpha if not given")
    conv_block_dims: tuple[int, ...] | None = option(None, help=f"ranks of convolutions larger than 1x1 {_BLOCKS}; 0: none there")
    conv_block_alphas: tuple[float, ...] | None = option(None, help="alphas of those convolutions; conv_alpha if not given")
    down_lr_weight: tuple[float, ...] | str | None = option(
        None,
        help="factors on the learning rate of the denoiser's down blocks, one each, or a curve over them: cosine, sine, linear, "
        "reverse_linear or zeros, raised by an offset if wanted (cosine+.25). A match in network_reg_lrs wins",
    )
    mid_lr_weight: tuple[float, ...] | str | None = option(None, help="the same for its middle blocks")
    up_lr_weight: tuple[float, ...] | str | None = option(None, help="the same for its up blocks")
    block_lr_zero_threshold: float | None = option(None, help="blocks with a factor of at most this get no adapter; 0 if not given")
    loraplus_lr_ratio: float | None = option(None, help="LoRA+: factor on the rate of each algorithm's boosted factor")
    loraplus_unet_lr_ratio: float | None = option(None, help="the same for the denoiser alone")
    loraplus_text_encoder_lr_ratio: float | None = option(None, help="the same for the text encoders alone")
    loraplus_targets: tuple[str, ...] = option((), help="the parameters that LoRA+ boosts instead, such as ['lokr_w2', 'lokr_w2_b']")
    path: Path = option(
        "auto",
        help="how deltas are computed: auto takes the cheapest way for each layer, factored never makes a whole dW (but for grouped "
        "convolutions of LoRA and LoHa), materialise always does; all give the same but for the last bits",
    )
    autotune: bool = option(
        False,
        help="measure the ways to a delta, once, instead of estimating them; kept in hadron/ways.json in the user's cache folder",
    )
    verbose: bool = option(False, help="list every adapted layer in the log")

    def at(self, target: Target) -> Self:
        """The arguments for one layer; algorithms with values by regex answer with those that hold there."""
        return self

    def patterns(self, name: str) -> Patterns:
        """The patterns of one argument, read once."""
        return self._patterns[name]

    @property
    def adapts_convolutions(self) -> bool:
        """Whether the family's convolutions are asked for."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    def check(self) -> Iterable[str]:
        """Everything wrong with the values, one sentence each."""
        yield from self._range_problems()
        yield from self._void_problems()
        for patterns in self._patterns.values():
            yield from patterns.problems
        yield from self.value_problems(
            "network_reg_dims", "a rank must be a whole number of at least 1 (exclude_patterns leaves layers out)", 1
        )
        yield from self.value_problems("network_reg_alphas", "an alpha must not be negative")
        yield from self.value_problems("network_reg_lrs", "a learning rate must not be negative")

    def value_problems(self, table: str, rule: str, whole_from: int | None = None) -> Iterable[str]:
        """The entries of a table that break `rule`: negative ones, or those that are no whole number of at least `whole_from`."""
        for entry in self.patterns(table).entries:
            fits = entry.value >= 0 if whole_from is None else entry.value >= whole_from and entry.value == int(entry.value)
            if not fits:
                yield f"{entry.where}: {rule}"

    @cached_property
    def _patterns(self) -> dict[str, Patterns]:
        lists = {name: pattern_list(getattr(self, name), f"{WHERE} {name}") for name in PATTERN_LISTS}
        return {**lists, **{name: pattern_table(getattr(self, name), f"{WHERE} {name}") for name in self.tables}}

    def _range_problems(self) -> Iterable[str]:
        if self.conv_dim is not None and self.conv_dim < 1:
            yield f"{WHERE} conv_dim={self.conv_dim}: must be at least 1"
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{WHERE} {name}={getattr(self, name)}: must be at least 0 and less than 1"
        for name in RATIOS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{WHERE} {name}={value}: must be more than 0"
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            bad = [number for number in numbers if isinstance(number, int | float) and not 0 <= number < math.inf]
            if bad:
                yield f"{WHERE} {name}={_shown(value)}: {'must not be negative' if min(bad) < 0 else 'is too large'}"

    def _void_problems(self) -> Iterable[str]:
        """Arguments that need another one to act."""
        chooses = bool(self.patterns("target_modules").entries)
        boosts = any(getattr(self, name) is not None for name in RATIOS)
        drops_ranks = self.rank_dropout != 0 and self.rank_dropout_mode == "rank"  # one by one: no way but through them
        weighs = any(getattr(self, name) is not None for name in LR_WEIGHTS)
        for name, is_set, is_met, needs in (
            ("conv_alpha", self.conv_alpha is not None, self.adapts_convolutions or chooses, "conv_dim"),
            ("use_tucker", self.use_tucker, self.adapts_convolutions or chooses, "conv_dim"),
            ("conv_block_alphas", self.conv_block_alphas is not None, self.adapts_convolutions or chooses, "conv_block_dims or conv_dim"),
            ("wd_on_output", not self.wd_on_output, self.dora_wd, "dora_wd"),
            ("dora_norm", self.dora_norm != "detached", self.dora_wd, "dora_wd"),
            ("rank_dropout_mode", self.rank_dropout_mode != "rank", self.rank_dropout != 0, "rank_dropout"),
            ("path", self.path == "materialise", not drops_ranks, "rank_dropout_mode=rows"),
            ("autotune", self.autotune, not drops_ranks, "rank_dropout_mode=rows"),
            ("autotune", self.autotune, self.path != "materialise", "another path, which leaves a choice,"),
            ("block_lr_zero_threshold", self.block_lr_zero_threshold is not None, weighs, "down_lr_weight, mid_lr_weight or up_lr_weight"),
            ("loraplus_targets", bool(self.loraplus_targets), boosts, "loraplus_lr_ratio"),
        ):
            if is_set and not is_met:
                yield f"{WHERE} {name}={_shown(getattr(self, name))}: is without effect unless {needs} is given too"


def advice(given: Iterable[Given]) -> dict[str, str]:
    """Names that are no argument here -> what to use instead; for `algo` the module of the algorithm that was asked for."""
    known = {"lora": "networks.lora", "locon": "networks.lora with conv_dim", "loha": "networks.loha", "lokr": "networks.lokr"}
    algorithm = next((str(item.value).strip().lower() for item in given if item.name == "algo"), "")
    module = known.get(algorithm)
    if module:
        return ELSEWHERE | {"algo": f"here the module is the algorithm: --network_module {module}"}
    return ELSEWHERE | {"algo": f"{ELSEWHERE['algo']}; lycoris.kohya has others"}


def unaliased(given: Iterable[Given]) -> tuple[list[Given], list[str]]:
    """The arguments under the names they have here, and what is wrong where one is given under two names."""
    found: dict[str, Given] = {}
    problems = []
    for item in given:
        name = ALIASES.get(item.name, item.name)
        if name in found:
            problems.append(f"{item.where}: {name} is given twice, also as {found[name].where.split()[-1]}")
        found.setdefault(name, Given(name, item.value, item.where, item.is_typed))
    return list(found.values()), problems


def boosted_by(arguments: NetworkArguments, signature: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """The parameters of an algorithm with this `signature` that loraplus_targets names, and what is wrong with the others."""
    known = {name.removesuffix(".weight"): name for name in signature}
    found, problems = [], []
    for text in arguments.loraplus_targets:
        name = text.strip().removesuffix(".weight")
        if name in known:
            found.append(known[name])
        else:
            near = nearest(name, known)
            hint = f"did you mean '{near}'?" if near else f"there are {', '.join(known)}"
            problems.append(f"{WHERE} loraplus_targets: this algorithm has no parameter '{name}'; {hint}")
    return tuple(found), problems


def _shown(value: Any) -> str:
    """A value as it may be written."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
