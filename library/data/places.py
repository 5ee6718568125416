"""Where things stand in a dataset file: line numbers for messages, which the TOML and JSON readers do not give."""

import re

Table = tuple[str | int, ...]
"""("general",), ("datasets", 0) or ("datasets", 0, 1): the second subset of the first dataset."""

_HEADER = re.compile(r"^\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
_KEY = re.compile(r"""^\s*["']?([\w-]+)["']?\s*[=.]""")


class Places:
    """The lines of the tables and keys of one dataset file, as far as its layout shows them."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lines: dict[tuple[Table, str], int] = {}
        self._scan()

    def line(self, table: Table, key: str = "") -> str:
        """` line N` of a key in a table, or of the table's header; empty where it cannot be told."""
        number = self._lines.get((table, key)) or (self._only_line(key) if key else None)
        return f" line {number}" if number else ""

    def _scan(self) -> None:
        table: Table = ()
        datasets, subsets = -1, -1
        for number, line in enumerate(self._text.splitlines(), 1):
            if header := _HEADER.match(line):
                name = re.sub(r"[\s\"']", "", header[1])
                if name == "datasets":
                    datasets, subsets = datasets + 1, -1
                    table = ("datasets", datasets)
                elif name == "datasets.subsets":
                    subsets += 1
                    table = ("datasets", datasets, subsets)
                else:
                    table = (name,)
                self._lines.setdefault((table, ""), number)
                self._lines.setdefault(((), name), number)
            elif key := _KEY.match(line):
                self._lines.setdefault((table, key[1]), number)

    def _only_line(self, key: str) -> int | None:
        """The line of a key in inline tables or JSON, where it occurs only once."""
        found = re.compile(rf"""["']?(?<![\w-]){re.escape(key)}(?![\w-])["']?\s*[=:]""")
        lines = [number for number, line in enumerate(self._text.splitlines(), 1) for _ in found.finditer(line)]
        return lines[0] if len(lines) == 1 else None
