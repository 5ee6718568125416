"""Options in TOML files: reading `--config_file` and `--preset`, and writing the file that `--output_config` asks for."""

import json
import textwrap
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.core.options import Declared, Given, declared, describe
from library.core.spelling import unknown

ASKS_NOTHING = (False, "", [])
"""Values with which files of other tools list options that are not used."""


COMMAND_LINE_ONLY = ("config_file", "output_config", "preset", "reproduce")
"""What says which files are read and written."""


def read_toml(path: Path, where: str) -> tuple[dict[str, Any], str]:
    """The table and the text of a TOML file. Raises `ValueError` that names `where` (the option) and the file."""
    named, path = path, path if path.suffix or path.is_file() or not path.name else path.with_suffix(".toml")
    if named.is_dir() and not path.is_file():
        raise ValueError(f"{where} {named}: is a folder, and a file is needed")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise ValueError(f"{where} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{where} {path}: {error}") from None


def read_options(
    path: Path,
    where: str,
    entries: Mapping[str, Declared],
    refuse: Mapping[str, str],
    problems: list[str],
    section: str | None = None,
) -> list[Given]:
    """The options that a TOML file gives, whatever sections they stand in; unknown, refused and double ones go to `problems`.

    `refuse` is that of `parse_command_line`. With `section` only that table is read. Raises `ValueError` for a file that is
    no TOML, or without that table.
    """
    table, text = read_toml(path, where)
    if section is not None:
        if not isinstance(table.get(section), dict):
            raise ValueError(f"{where} {path}: has no [{section}]; give the lock.toml of a run")
        table = table[section]
    names = spellings(entries)
    tables = {name for name, entry in entries.items() if describe(entry.kind) == "table"}
    given: dict[str, Given] = {}
    lines: dict[str, int] = {}  # of each key, where it stood last
    for key, value in _flat(table, tables):
        is_other_spelling = key not in lines
        lines[key] = line_number(text, key, lines.get(key, 0))
        place = f"{path} {f'line {lines[key]} ' if lines[key] else ''}({key})"
        name = names.get(key)
        if key in COMMAND_LINE_ONLY:
            problems.append(f"{place}: is for the command line only; leave it out of the file")
        elif name is not None and name not in given:
            given[name] = Given(name, value, place, is_typed=True)
        elif name is not None and is_other_spelling and value in (False, entries[name].default):
            pass  # files of other tools list every spelling of an option, used or not
        elif name is not None and is_other_spelling and given[name].value in (False, entries[name].default):
            given[name] = Given(name, value, place, is_typed=True)
        elif name is not None:
            problems.append(f"{place}: given twice; the other is {given[name].where}")
        elif key not in refuse:
            problems.append(f"{place}: {unknown(key, entries, 'option')}")
        elif value not in ASKS_NOTHING:
            problems.append(f"{place}: {refuse[key]}")
    return list(given.values())


def written_options(groups: Sequence[type], values: Mapping[str, Any], given: Collection[str]) -> str:
    """A TOML text with all options of the groups: those in `given` as they are in `values`, the others as comments with their defaults."""
    blocks = ["# Options for --config_file. Lines that begin with # are not set and show the default; section names are free."]
    for group in groups:
        title = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
        lines = [f'["{title}"]']
        for entry in declared(group):
            lines += [f"# {line}" for line in textwrap.wrap(entry.help, 118)]
            if entry.is_secret:
                lines.append(f"# {entry.name} is a secret, which no file shall hold")
                continue
            value = values[entry.name]
            mark = "" if entry.name in given and value is not None else "# "
            lines.append(f"{mark}{entry.name} ={'' if value is None else ' ' + toml_value(value)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def toml_value(value: Any) -> str:
    """A value of an option as TOML writes it: booleans, numbers, texts, paths, lists and tables of them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{toml_value(str(key))} = {toml_value(item)}' for key, item in value.items())} }}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def spellings(entries: Mapping[str, Declared]) -> dict[str, str]:
    """Every spelling of every option, without dashes -> its name."""
    return {flag[2:]: name for name, entry in entries.items() for flag in entry.flags} | {name: name for name in entries}


def line_number(text: str, key: str, after: int = 0) -> int:
    """The line on which `key =` first stands after line `after` of a TOML text, or 0."""
    for number, line in enumerate(text.splitlines(), 1):
        if number > after and line.split("=", 1)[0].strip().strip("\"'") == key and "=" in line:
            return number
    return 0


def _flat(table: Mapping[str, Any], tables: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values outside and inside sections, however deep; `tables` are the options whose value is a table."""
    for key, value in table.items():
        if isinstance(value, dict) and key not in tables:
            yield from _flat(value, tables)
        else:
            yield key, value
