"""What the tools share on the screen: spans of numbers, and options that may stand without their flag."""

from collections.abc import Sequence


def spread(numbers: Sequence[int]) -> str:
    """One number, or the smallest and the largest."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def with_flags(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command line with the words before its first option put behind the options that they stand for."""
    words = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = [part for flag, word in zip(flags, argv[:words], strict=False) for part in (flag, word)]
    return [*named, *argv[min(words, len(flags)) :]]
