"""What the tools share on the screen: tables, spans of numbers, and options that may stand without their flag."""

from collections.abc import Sequence

NUMERIC = set("0123456789+-.,%e")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows below their header, as text with one line a row; a column of numbers is aligned to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(set(entry) <= NUMERIC for entry in column[1:]) for column in columns]
    lines = [
        "  ".join(entry.rjust(width) if to_right else entry.ljust(width) for entry, width, to_right in zip(row, widths, right, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def spread(numbers: Sequence[int]) -> str:
    """One number, or the smallest and the largest."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def with_flags(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command line with the words before its first option put behind the options that they stand for."""
    words = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = [part for flag, word in zip(flags, argv[:words], strict=False) for part in (flag, word)]
    return [*named, *argv[min(words, len(flags)) :]]
