r"""Emphasis in captions: `(more)`, `[less]`, `(as given:1.3)`, the syntax of AUTOMATIC1111's web interface.

Round brackets multiply the weight of the words in them by 1.1, square ones divide it by 1.1, and brackets in brackets do both. A
backslash makes a bracket or another backslash plain text: `\(`, `\]`, `\\`. A bracket that nothing closes holds to the end of the
caption; one that closes nothing is text.
"""

import re
from typing import NamedTuple

STEP = 1.1

_WEIGHT = r":\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
_PIECE = re.compile(rf"\\(?P<escaped>[\\()\[\]])|{_WEIGHT}|[()\[\]]|[^\\()\[\]:]+|[\\:]")


class Emphasised(NamedTuple):
    """A stretch of a caption, and the weight of its words."""

    text: str
    weight: float


def emphasised(caption: str) -> list[Emphasised]:
    """The stretches of a caption in order, without the marks; neighbours of one weight are joined.

    A caption without text is one empty stretch.
    """
    found: list[Emphasised] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where the brackets that are open begin
    for match in _PIECE.finditer(caption):
        piece, weight = match[0], match["weight"]
        if piece in opened:
            opened[piece].append(len(found))
        elif weight and opened["("]:
            _weigh(found, opened["("].pop(), float(weight))
        elif piece == ")" and opened["("]:
            _weigh(found, opened["("].pop(), STEP)
        elif piece == "]" and opened["["]:
            _weigh(found, opened["["].pop(), 1 / STEP)
        else:
            found.append(Emphasised(match["escaped"] or piece, 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        for start in opened[bracket]:
            _weigh(found, start, factor)
    return _joined(found) or [Emphasised("", 1.0)]


def _weigh(stretches: list[Emphasised], start: int, factor: float) -> None:
    stretches[start:] = [stretch._replace(weight=stretch.weight * factor) for stretch in stretches[start:]]


def _joined(stretches: list[Emphasised]) -> list[Emphasised]:
    joined: list[Emphasised] = []
    for stretch in stretches:
        if joined and joined[-1].weight == stretch.weight:
            stretch = Emphasised(joined.pop().text + stretch.text, stretch.weight)
        joined.append(stretch)
    return joined
