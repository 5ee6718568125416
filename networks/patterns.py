"""Patterns: regexes over the dotted names of layers, alone or with a number each, in every form a user may write them.

A pattern must fit the whole name: the canonical one of the original checkpoint, or the library's module path as a second spelling.
A regex with a negative lookaround (`(?!`, `(?<!`) sees the canonical name only: "all but input_blocks" would else fit every layer by
its other name.
"""

import ast
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLE_FORMS = "regex=number,regex=number, a table such as {'regex': 8}, or the path of a .json or .toml file with one"
TABLE_FILES = (".json", ".toml")
PLAIN_LIST = re.compile(r"[\w.*]+(\s*,\s*[\w.*]+)+")


@dataclass(frozen=True)
class Pattern:
    """One regex with its value, where it has one, and its place in the arguments."""

    regex: re.Pattern[str]
    value: float
    where: str

    def matches(self, path: str, module_path: str = "") -> bool:
        """Whether the whole canonical name fits, or the whole module path."""
        return self.regex.fullmatch(path) is not None or (self.reads_module_paths and self.regex.fullmatch(module_path) is not None)

    @property
    def reads_module_paths(self) -> bool:
        """Whether the second spelling counts."""
        return "(?!" not in self.regex.pattern and "(?<!" not in self.regex.pattern


@dataclass
class Patterns:
    """The patterns of one argument and what is wrong with the others."""

    entries: list[Pattern] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, text: Any, value: Any, where: str) -> None:
        """Take one pattern, or note why not."""
        where = f"{where} '{text}'"
        if not isinstance(text, str) or not text.strip():
            self.problems.append(f"{where}: a regular expression is needed, and it must not be empty")
            return
        try:
            regex = re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            self.problems.append(f"{where}: not a regular expression ({error})")
            return
        number = _number(value)
        if number is None:
            nested = "; put quotes around a regex that holds dots" if isinstance(value, Mapping) else ""
            self.problems.append(f"{where}: {value!r} is not a number{nested}")
        else:
            self.entries.append(Pattern(regex, number, where))

    def first(self, path: str, module_path: str = "") -> Pattern | None:
        """The first pattern that matches."""
        return next((entry for entry in self.entries if entry.matches(path, module_path)), None)


def texts_of(value: str | Sequence[Any]) -> list[Any]:
    """The texts of an argument that takes one text, a list, a Python list's text as sd-scripts takes it, or `a,b`; none for a blank."""
    if not isinstance(value, str):
        return list(value)
    if value.strip().startswith("["):
        try:
            return list(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, TypeError):  # a regex may begin with a bracket too
            pass
    if PLAIN_LIST.fullmatch(value.strip()):  # no name holds a comma
        return [text.strip() for text in value.split(",")]
    return [value] if value.strip() else []


def pattern_list(value: str | Sequence[Any], where: str) -> Patterns:
    """Patterns without numbers."""
    patterns = Patterns()
    for text in texts_of(value):
        patterns.add(text, 0, where)
    return patterns


def pattern_table(value: Mapping[str, Any] | str | None, where: str) -> Patterns:
    """Patterns with numbers, of a table or of its text; blank text is an empty table.

    Forms of the text: `regex=8,regex2=4` (a comma or `=` inside a regex does no harm where no number and comma follow it); a JSON
    object, TOML inline table or Python dict; the path of a .json or .toml file that holds the table. The order of the patterns is kept.
    """
    patterns = Patterns()
    if isinstance(value, str):
        try:
            value = _read_table(value.strip())
        except (OSError, ValueError, RecursionError) as error:
            patterns.problems.append(f"{where} '{value}': {error}")
            return patterns
    for text, number in (value or {}).items():
        patterns.add(text, number, where)
    return patterns


# Forms of a table


def _read_table(text: str) -> Mapping[str, Any]:
    """Raises `ValueError` or `OSError` for what is none of the forms."""
    if text.lower().endswith(TABLE_FILES):
        return _read_table_file(Path(text))
    if text.startswith("{"):
        return _read_literal(text)
    found = list(re.finditer(r"(.+?)=\s*([-+.\w]+)\s*(?:,|$)", text))
    if "".join(match.group() for match in found) != text:
        raise ValueError(f"must be of the form {TABLE_FORMS}")
    table = {match.group(1).strip(): match.group(2) for match in found}
    if len(table) < len(found):
        raise ValueError("a regex is given twice; the first match counts, so leave the others out")
    return table


def _read_table_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError("there is no such file")
    content = path.read_text(encoding="utf-8")
    table = json.loads(content) if path.suffix.lower() == ".json" else tomllib.loads(content)
    if not isinstance(table, dict):
        raise ValueError("the file holds no table of the form {'regex': 8}")
    return table


def _read_literal(text: str) -> Mapping[str, Any]:
    """A table in the notation of JSON, TOML or Python, whichever understands it."""
    for table in _readings(text):
        if isinstance(table, dict):
            return table
    raise ValueError("is no table in the notation of JSON, TOML or Python, such as {'a{1,2}=b': 8}")


def _readings(text: str) -> Iterator[Any]:
    for read in (json.loads, ast.literal_eval, lambda text: tomllib.loads(f"table = {text}")["table"]):
        try:
            yield read(text)
        except (ValueError, SyntaxError, TypeError):  # another notation, perhaps
            continue


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
