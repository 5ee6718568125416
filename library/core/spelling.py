"""Nearest names: what a misspelt option, key or argument was probably meant to be."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, or None where nothing comes near; case, `-` and `_` make no difference."""
    by_fold = {_fold(name): name for name in known}
    matches = get_close_matches(_fold(word), list(by_fold), n=1, cutoff=0.6)
    if matches:
        return by_fold[matches[0]]
    holds = [name for fold, name in by_fold.items() if len(_fold(word)) >= 4 and (_fold(word) in fold or fold in _fold(word))]
    return max(holds, key=lambda name: SequenceMatcher(None, _fold(word), _fold(name)).ratio(), default=None)


def unknown(word: str, known: Iterable[str], what: str = "name") -> str:
    """Half a sentence for an error: the unknown word, and the nearest known one or the whole short list."""
    names = list(known)
    near = nearest(word, names)
    if near is not None:
        return f"unknown {what} '{word}'; did you mean '{near}'?"
    if len(names) <= 12:
        return f"unknown {what} '{word}'; known: {', '.join(names) or 'none'}"
    return f"unknown {what} '{word}'"


def _fold(word: str) -> str:
    return word.lower().replace("-", "_").strip("_")
