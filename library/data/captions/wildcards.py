"""Wildcards: `{a|b|c}` in a caption stands for one of its choices, and choices may hold wildcards themselves.

A choice may be empty. `{{` and `}}` are literal braces: a pair of them around any text, or one of them that nothing matches. Braces
that are no wildcard's, among them `{}`, stay as typed.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

Wordings = list[str]
"""The texts that a part of a caption may become; while drawing, only one."""

_PIECE = re.compile(r"[{}|]|[^{}|]+")


def drawn_wording(text: str, draw: random.Random) -> str:
    """The text with one choice drawn for each wildcard, as likely as the others beside it; inner wildcards are drawn before outer ones."""
    return _wordings(text, draw.choice, 1)[0]


def every_wording(text: str, most: int) -> list[str] | None:
    """All texts that wildcards may give, the first choices first and each once; None where there are more than `most`."""
    found = _wordings(text, lambda choices: dict.fromkeys(chain.from_iterable(choices)), most + 1)
    return None if len(found) > most else list(dict.fromkeys(found))


def longest_wording(text: str) -> str:
    """The text with the longest choice of each wildcard, counted in characters."""
    return _wordings(text, lambda choices: [max(chain.from_iterable(choices), key=len)], 1)[0]


def _wordings(text: str, pick: Callable[[list[Wordings]], Iterable[str]], limit: int) -> Wordings:
    """What the text may become when `pick` says what each wildcard gives for its choices, up to `limit` of them."""
    levels: list[list[Wordings]] = [[[""]]]  # the text, then the choices so far of each wildcard that is open
    for piece, is_mark in _pieces(text):
        if not is_mark or (piece == "|" and len(levels) == 1):
            _continue(levels[-1], [piece], limit)
        elif piece == "{":
            levels.append([[""]])
        elif piece == "|":
            levels[-1].append([""])
        else:
            choices = levels.pop()
            _continue(levels[-1], ["{}"] if choices == [[""]] else list(pick(choices)), limit)
    return levels[0][0]


def _continue(choices: list[Wordings], wordings: Wordings, limit: int) -> None:
    """Add each of the wordings to the last choice, and keep no more than `limit` of what it may become then."""
    choices[-1] = list(islice((start + end for start in choices[-1] for end in wordings), limit))


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is a mark: a bar, or a brace that has its other half. Literal braces are single here."""
    halves = _halves(text)
    literal_ends: set[int] = set()
    position = 0
    while match := _PIECE.match(text, position):
        piece = match[0]
        half, next_half = halves.get(position), halves.get(position + 1)
        doubled = text[position : position + 2]
        if doubled == "{{" and half is not None and next_half is not None and half == next_half + 1:
            is_literal = True
            literal_ends.add(next_half)
        else:
            is_literal = position in literal_ends or (doubled in ("{{", "}}") and half is None and next_half is None)
        yield piece, not is_literal and (half is not None or piece == "|")
        position += 2 if is_literal else len(piece)


def _halves(text: str) -> dict[int, int]:
    """From the place of each brace that is matched to the place of its other half."""
    halves: dict[int, int] = {}
    opened: list[int] = []
    for position, character in enumerate(text):
        if character == "{":
            opened.append(position)
        elif character == "}" and opened:
            start = opened.pop()
            halves |= {start: position, position: start}
    return halves
