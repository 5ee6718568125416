"""What PEFT keeps beside the tensors: rank and alpha of each layer, by patterns, in `adapter_config.json` or in a file's metadata."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("LORA", "LOHA", "LOKR")
CHANGES = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "trainable_token_indices")
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of initialisations that change the base's weights
METADATA = "lora_adapter_metadata"  # where diffusers writes it: JSON, keys with the component before them
MAX_CHARACTERS = 4_000_000
MAX_PATTERN, MAX_REPEATS = 400, 6


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Ranks and alphas of an adapter. Patterns match a whole dotted path or its end after a dot, as names or as regexes."""

    kind: str = "LORA"
    rank: float
    alpha: float
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False  # rsLoRA: alpha / sqrt(rank)

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> "PeftConfig":
        """The typed configuration. Raises `ValueError` saying all that is wrong with it or not known here."""
        kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
        problems = [] if kind in KINDS else [f"peft_type {kind}: only {', '.join(KINDS)} are read"]
        problems += [f"{name}: this variant is not read" for name in CHANGES if config.get(name)]
        start = str(config.get("init_lora_weights")).lower()
        problems += (
            [f"init_lora_weights {start}: the adapter is of changed base weights, not of the model's"] if start.startswith(REBASED) else []
        )
        ranks, alphas = _patterns(config, "rank_pattern", problems), _patterns(config, "alpha_pattern", problems)
        rank = _number(config.get("r"), "r", problems)
        word = "lora_alpha" if kind == "LORA" else "alpha"
        alpha = _number(config.get(word, config.get("r")), word, problems)
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}")
        stable = config.get("use_rslora") is True
        return cls(kind=kind, rank=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, rank_stabilised=stable)

    def scale(self, path: str) -> float:
        """What PEFT multiplies the delta of the layer at this path by."""
        rank, alpha = _first(self.rank_pattern, path, self.rank), _first(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_config(text: str, where: str) -> PeftConfig:
    """The configuration in an `adapter_config.json`. Raises `ValueError`."""
    return PeftConfig.of(_object(text, where), where)


def read_metadata(text: str, where: str) -> dict[str, PeftConfig]:
    """The configurations in a file's metadata, by component: `unet`, `text_encoder`, ... Raises `ValueError`."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in _object(text, where).items():
        component, _, name = key.rpartition(".")
        tables.setdefault(component, {})[name] = value
    return {component: PeftConfig.of(table, f"{where} {component}".strip()) for component, table in tables.items() if "r" in table}


def _object(text: str, where: str) -> dict[str, Any]:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{where}: {len(text)} characters are no configuration")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def _number(value: Any, name: str, problems: list[str]) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < abs(value) < 1e12 or (value < 0 and not name.endswith("alpha")):
        problems.append(f"{name}: {value!r:.60} is not a positive number")
        return 1.0
    return float(value)


def _patterns(config: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, float]:
    table = config.get(name) or {}
    if not isinstance(table, dict):
        problems.append(f"{name}: {table!r:.60} is not a table")
        return {}
    for pattern in table:
        repeats = len(re.findall(r"[*+{]", pattern))
        if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
            problems.append(f"{name}: the pattern '{pattern:.60}' is too intricate to be matched safely")
        elif not _compiles(pattern):
            problems.append(f"{name}: the pattern '{pattern:.60}' is not a regex")
    return {pattern: _number(value, f"{name} '{pattern:.60}'", problems) for pattern, value in table.items()}


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _first(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    """The value of the first pattern that is the path or its end after a dot (PEFT's `get_pattern_key`)."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), otherwise)
