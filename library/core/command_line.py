"""The command line and `--config_file` of a script, made from its option groups.

Precedence: default < config file < command line. Nothing is taken half: unknown names, wrong types and bad choices of both
sources are reported together.
"""

import argparse
import io
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from library.core.log import ROOT_LOGGER
from library.core.options import Declared, Given, OptionError, _build, _convert_into, declared, describe
from library.core.spelling import unknown

Group = TypeVar("Group")
CONFIG_HELP = "TOML file with options (section names are free); the command line wins over it"


class OptionSet:
    """The option groups of one run, frozen after checking. `options[SaveOptions]` gives one group."""

    def __init__(self, groups: Mapping[type, Any], given: frozenset[str]) -> None:
        self._groups = dict(groups)
        self.given = given  # names that the user wrote, in the file or on the command line

    def __getitem__(self, group: type[Group]) -> Group:
        return self._groups[group]

    @property
    def groups(self) -> tuple[type, ...]:
        """The groups there are, in the order of the help."""
        return tuple(self._groups)

    def values(self) -> dict[str, Any]:
        """Every option by name, for metadata and lock files."""
        return {entry.name: getattr(self._groups[group], entry.name) for group in self._groups for entry in declared(group)}


def parse_command_line(
    groups: Sequence[type], argv: Sequence[str], *, prog: str, about: str, refuse: Mapping[str, str] | None = None
) -> OptionSet:
    """Read `argv` into the groups. `refuse` maps retired or later options to the advice to give when they are used.

    Raises `OptionError` with all problems at once. Prints help and exits on `-h`.
    """
    entries = {entry.name: entry for group in groups for entry in declared(group)}
    assert len(entries) == sum(len(declared(group)) for group in groups), "two groups declare the same option"
    problems: list[str] = []
    line, extras = _parser(entries.values(), prog, about).parse_known_args(list(argv))
    problems += _unknown_flags(extras, entries, refuse or {})
    given = [Given(name, value, entries[name].flags[0]) for name, value in vars(line).items() if name != "config_file"]
    if line_config := getattr(line, "config_file", None):
        given = _config_values(Path(line_config), entries, refuse or {}, problems) + given
    values: dict[str, Any] = {}
    for item in given:
        _convert_into(values, entries[item.name], item, problems)
    built = {group: _attempt(group, entries, values, problems) for group in groups}
    if problems:
        raise OptionError(dict.fromkeys(problems))
    return OptionSet(built, frozenset(item.name for item in given))


def run_script(main: Callable[[list[str]], object]) -> None:
    """Call `main` with the arguments; a `ValueError` is the user's to mend: exit status 2, the traceback only at log level DEBUG.

    Ctrl-C ends with status 130. What the screen's encoding lacks, such as an emoji in a file name, is printed as its code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except ValueError as error:
        ROOT_LOGGER.debug("where it came from", exc_info=True)
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        raise SystemExit(130) from None


def markdown_table(groups: Sequence[type]) -> str:
    """The options of the groups as Markdown: one heading and table a group, from its docstring and fields."""
    blocks = []
    for group in groups:
        rows = [
            f"| `{entry.flags[0]}` | {_cell(describe(entry.kind))} | {_cell(_default_text(entry))} | {_cell(entry.help)} |"
            for entry in declared(group)
        ]
        title = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
        blocks.append("\n".join([f"### {title}", "", "| option | type | default | meaning |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(blocks) + "\n"


# The parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError([message])


def _parser(entries: Any, prog: str, about: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config_file", metavar="FILE", help=CONFIG_HELP)
    sections: dict[type, Any] = {}
    for entry in entries:
        if entry.group not in sections:
            sections[entry.group] = parser.add_argument_group((entry.group.__doc__ or "").strip().splitlines()[0].rstrip("."))
        help_text = textwrap.shorten(f"{entry.help} ({_default_text(entry)})", 400).replace("%", "%%")
        if entry.is_flag:
            positive = sections[entry.group]
            positive.add_argument(*entry.flags, dest=entry.name, action="store_true", help=help_text)
            negatives = [spelling for flag in entry.flags for spelling in (f"--no-{flag[2:]}", f"--no_{flag[2:]}")]
            parser.add_argument(*negatives, dest=entry.name, action="store_false", help=argparse.SUPPRESS)
        else:
            nargs = "*" if entry.is_list else None
            metavar = entry.name.upper() if len(describe(entry.kind)) > 24 else describe(entry.kind).replace(" ", "-")
            sections[entry.group].add_argument(*entry.flags, dest=entry.name, nargs=nargs, metavar=metavar, help=help_text)
    return parser


def _default_text(entry: Declared) -> str:
    if entry.required:
        return "required"
    if entry.default is None or entry.default == ():
        return "none"
    return str(entry.default).lower() if isinstance(entry.default, bool) else str(entry.default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# Problems


def _unknown_flags(extras: Sequence[str], entries: Mapping[str, Declared], refuse: Mapping[str, str]) -> list[str]:
    known = [flag for entry in entries.values() for flag in entry.flags]
    problems = []
    for extra in extras:
        name = extra.split("=", 1)[0]
        if not extra.startswith("--"):
            if not problems:  # what follows an unknown flag is its value and needs no line of its own
                problems.append(f"'{extra}' stands where an option was expected; put values with spaces in quotes")
        elif name[2:] in refuse:
            problems.append(f"{name}: {refuse[name[2:]]}")
        else:
            problems.append(unknown(name, known, "option"))
    return problems


def _config_values(path: Path, entries: Mapping[str, Declared], refuse: Mapping[str, str], problems: list[str]) -> list[Given]:
    table, text = read_toml(path, "--config_file")
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(value if isinstance(value, dict) and key not in entries else {key: value})
    given = []
    for key, value in flat.items():
        where = f"{path} {line_of(text, key)}({key})"
        if key in entries:
            given.append(Given(key, value, where, is_typed=True))
        elif key not in refuse:
            problems.append(f"{where}: {unknown(key, entries, 'option')}")
        elif value not in (False, "", []):  # files written by other tools list every option, those that ask for nothing too
            problems.append(f"{where}: {refuse[key]}")
    return given


def _attempt(group: type, entries: Mapping[str, Declared], values: Mapping[str, Any], problems: list[str]) -> Any:
    own = {name: value for name, value in values.items() if entries[name].group is group}
    found: list[str] = []
    try:
        return _build(group, own, found)
    except OptionError as error:
        given_wrongly = {problem.split(" ")[0].rstrip(":") for problem in problems}
        problems += [problem for problem in error.problems if problem.split(" ")[0] not in given_wrongly]
        return None


# TOML


def read_toml(path: Path, where: str) -> tuple[dict[str, Any], str]:
    """The table and the text of a TOML file. Raises `ValueError` that names `where` (the option) and the file."""
    named, path = path, path if path.suffix or path.is_file() else path.with_suffix(".toml")
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


def line_of(text: str, key: str, after: int = 0) -> str:
    """`line N ` where `key =` first stands after line `after` of a TOML text, or an empty string."""
    for number, line in enumerate(text.splitlines(), 1):
        if number > after and line.split("=", 1)[0].strip().strip("\"'") == key and "=" in line:
            return f"line {number} "
    return ""
