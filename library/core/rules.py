"""Options that have no effect with the rest of a command: each is said, none is silently ignored."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from library.core.command_line import OptionSet


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`option`, where the user gave it, has no effect if `when` holds for the values of all options."""

    option: str
    when: Callable[[dict[str, Any]], Any]
    because: str


def without_effect(options: OptionSet, rules: Iterable[Rule]) -> Iterator[str]:
    """One sentence for every option that was given in vain."""
    values = options.values()
    for rule in rules:
        if rule.option in options.given and rule.when(values):
            yield f"--{rule.option} has no effect: {rule.because}"
