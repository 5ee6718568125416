"""Where things stand in a dataset file: line numbers for messages, which the TOML and JSON readers do not give."""

import re
from pathlib import Path
from typing import Protocol

Table = tuple[str | int, ...]
"""("general",), ("datasets", 0) or ("datasets", 0, 1): the second subset of the first dataset."""

_HEADER = re.compile(r"^\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
_KEY = re.compile(r"""^\s*["']?([\w-]+)["']?\s*[=.]""")


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


class Places(Protocol):
    """The lines of the tables and keys of one dataset file."""

    def line(self, table: Table, key: str = "") -> str:
        """` line N` of a key in a table, or of the table's header; empty where it cannot be told."""
        ...


def places_of(path: Path, text: str) -> Places:
    """The places in a file that was read as TOML, or as JSON where its name says so."""
    return JsonPlaces(text) if path.suffix.lower() == ".json" else TomlPlaces(text)


class TomlPlaces:
    """The lines of a TOML file, as far as its layout shows them."""

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
                    parent, _, key = name.rpartition(".")
                    wider: dict[str, Table] = {"datasets": ("datasets", datasets), "datasets.subsets": ("datasets", datasets, subsets)}
                    self._lines.setdefault((wider.get(parent, (parent,)), key), number)
                self._lines.setdefault((table, ""), number)
                self._lines.setdefault(((), name), number)
            elif match := _KEY.match(line):
                self._lines.setdefault((table, match[1]), number)

    def _only_line(self, key: str) -> int | None:
        """The line of a key in inline tables, where it occurs only once."""
        found = re.compile(rf"""["']?(?<![\w-]){re.escape(key)}(?![\w-])["']?\s*[=:]""")
        lines = [number for number, line in enumerate(self._text.splitlines(), 1) for _ in found.finditer(line)]
        return lines[0] if len(lines) == 1 else None


class JsonPlaces:
    """The lines of a JSON file."""

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[Table, str], int] = {}
        self._scan(text)

    def line(self, table: Table, key: str = "") -> str:
        """` line N` of a key in a table, or of the table's opening brace; empty where neither is there."""
        number = self._lines.get((table, key))
        return f" line {number}" if number else ""

    def _scan(self, text: str) -> None:
        """Follow braces, brackets and keys; `path` holds a key or a position for each that is open."""
        path: list[str | int] = []
        number, seen, before = 1, 0, ""
        for token in _TOKEN.finditer(text):
            number += text.count("\n", seen, token.start())
            seen = token.start()
            word = token[0]
            if word in "{[":
                self._lines.setdefault((_table(path), ""), number)
                path.append("" if word == "{" else 0)
            elif word in "}]":
                path.pop()
            elif word == "," and path and isinstance(path[-1], int):
                path[-1] += 1
            elif word == ":" and path:
                path[-1] = before.strip('"')
                self._lines.setdefault((_table(path[:-1]), before.strip('"')), number)
            before = word


def _table(path: list[str | int]) -> Table:
    """A path in the file as the table it leads to: positions, and the name of the outermost list or table alone."""
    return tuple(step for depth, step in enumerate(path) if depth == 0 or isinstance(step, int))
