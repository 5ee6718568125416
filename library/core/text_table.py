"""Tables as text, for terminals and log files."""

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
