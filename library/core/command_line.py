"""The command line, `--preset`, `--reproduce` and `--config_file` of a script, made from its option groups.

Precedence: default < preset < lock file < config file < command line. Nothing is taken half: unknown names, wrong types and bad
choices of all sources are reported together.
"""

import argparse
import io
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from library.core.atomic import write_text
from library.core.config_file import read_options, read_toml, written_options
from library.core.log import ROOT_LOGGER
from library.core.options import Declared, Given, OptionError, _build, _convert_into, declared, describe
from library.core.secrets import keep_secret
from library.core.spelling import unknown

Group = TypeVar("Group")
CONFIG_HELP = "TOML file with options (section names are free); the command line wins over it"
OUTPUT_HELP = "write all options to the new file that --config_file names, and end"
PRESET_HELP = "options for a card ({}) or a TOML file of yours; --config_file and the command line win over them"
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
LONGEST_METAVAR = 24  # letters; a longer kind, such as a list of choices, stands behind the help


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
        """Every option by name, secrets left out."""
        every = ((group, entry) for group in self._groups for entry in declared(group))
        return {entry.name: getattr(self._groups[group], entry.name) for group, entry in every if not entry.is_secret}

    def secrets(self) -> list[str]:
        """The values of the secret options that were given."""
        every = ((group, entry) for group in self._groups for entry in declared(group))
        values = (getattr(self._groups[group], entry.name) for group, entry in every if entry.is_secret)
        return [value for value in values if value is not None]


def parse_command_line(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    about: str,
    refuse: Mapping[str, str] | None = None,
    presets: Mapping[str, Path] | None = None,
    family: str | None = None,
) -> OptionSet:
    """Read `argv` into the groups.

    `refuse` maps retired or later options to the advice to give when they are used. `presets` are the files of `--preset` by name;
    without them there is no such option. `family`, where given, is what the lock file of `--reproduce` has to be of.
    Raises `OptionError` with all problems at once. Prints help and exits on `-h`; writes a file and exits on `--output_config`.
    """
    entries = {entry.name: entry for group in groups for entry in declared(group)}
    assert len(entries) == sum(len(declared(group)) for group in groups), "two groups declare the same option"
    refuse, presets = refuse or {}, presets or {}
    problems: list[str] = []
    line, extras = _parser(entries.values(), prog, about, presets).parse_known_args(list(argv))
    problems += _unknown_flags(extras, entries, refuse)
    own = vars(line)
    preset, config, writes = own.pop("preset", None), own.pop("config_file", None), own.pop("output_config", False)
    on_line = [Given(name, value, entries[name].flags[0]) for name, value in own.items()]
    in_preset = read_options(_preset_file(preset, presets), "--preset", entries, refuse, problems) if preset is not None else []
    in_lock = _locked(own["reproduce"], family, entries, refuse, problems) if "reproduce" in own else []
    in_file = read_options(Path(config), "--config_file", entries, refuse, problems) if config is not None and not writes else []
    values: dict[str, Any] = {}
    for item in (*in_preset, *in_lock, *in_file, *on_line):
        _convert_into(values, entries[item.name], item, problems)
    built = {group: _attempt(group, entries, values, problems) for group in groups}
    if problems:
        raise OptionError(dict.fromkeys(problems))
    # a file may list every option there is: one at its default asks for nothing, and a preset is no wish of the user's
    from_files = (item.name for item in (*in_lock, *in_file))
    asked = {item.name for item in on_line} | {name for name in from_files if values[name] != entries[name].default}
    options = OptionSet(built, frozenset(asked))
    keep_secret(options.secrets())
    if writes:
        values.pop("reproduce", None)  # what it says is in the file
        _write_config(config, groups, options.values(), values)
    return options


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


def _parser(entries: Any, prog: str, about: str, presets: Mapping[str, Path]) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own takes -1e-4 for an option
    parser.add_argument("--config_file", metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--output_config", action="store_true", help=OUTPUT_HELP)
    if presets:
        parser.add_argument("--preset", metavar="NAME", help=PRESET_HELP.format(", ".join(presets)))
    sections: dict[type, Any] = {}
    for entry in entries:
        if entry.group not in sections:
            sections[entry.group] = parser.add_argument_group((entry.group.__doc__ or "").strip().splitlines()[0].rstrip("."))
        kind = describe(entry.kind)
        is_long = len(kind) > LONGEST_METAVAR
        choices = f"; {kind}" if is_long and not entry.is_flag else ""
        help_text = textwrap.shorten(f"{entry.help} ({_default_text(entry)}{choices})", 600).replace("%", "%%")
        if entry.is_flag:
            positive = sections[entry.group]
            positive.add_argument(*entry.flags, dest=entry.name, action="store_true", help=help_text)
            negatives = [spelling for flag in entry.flags for spelling in (f"--no-{flag[2:]}", f"--no_{flag[2:]}")]
            parser.add_argument(*negatives, dest=entry.name, action="store_false", help=argparse.SUPPRESS)
        else:
            nargs = "*" if entry.is_list else None
            metavar = entry.name.upper() if is_long else kind.replace(" ", "-")
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


# Files


def _preset_file(given: str, presets: Mapping[str, Path]) -> Path:
    """The file of a preset's name; anything that looks like a path is the path of a preset of the user's own."""
    if given in presets:
        return presets[given]
    if given.endswith(".toml") or Path(given).parent != Path() or Path(given).is_file():
        return Path(given)
    raise OptionError([f"--preset: {unknown(given, presets, 'preset')}; or give a TOML file of yours"])


def _locked(given: str, family: str | None, entries: Mapping[str, Declared], refuse: Mapping[str, str], problems: list[str]) -> list[Given]:
    """The options of a lock file: those that were given then, and the defaults of then, of which one that is gone asks for nothing."""
    path = Path(given)
    run = read_toml(path, "--reproduce")[0].get("run", {})
    if family is not None and isinstance(run, dict) and run.get("family", family) != family:
        raise OptionError([f"--reproduce {path}: a run of another family ({run['family']}, not {family}); use its own script"])
    defaults = read_options(path, "--reproduce", entries, refuse, [], "defaults")
    return [*defaults, *read_options(path, "--reproduce", entries, refuse, problems, "options")]


def _write_config(config: str | None, groups: Sequence[type], values: Mapping[str, Any], given: Mapping[str, Any]) -> NoReturn:
    """Write what `--output_config` asks for, and end the script."""
    if not config:
        raise OptionError(["--output_config: name the file to write with --config_file"])
    path = Path(config) if Path(config).suffix else Path(config).with_suffix(".toml")
    if path.exists():
        raise OptionError([f"--output_config: {path} exists already; name a new file with --config_file"])
    try:
        write_text(path, written_options(groups, values, given))
    except OSError as error:
        raise OptionError([f"--output_config: cannot write {path} ({error.strerror or error})"]) from error
    sys.stderr.write(f"wrote {path}\n")
    raise SystemExit(0)


# Problems


def _unknown_flags(extras: Sequence[str], entries: Mapping[str, Declared], refuse: Mapping[str, str]) -> list[str]:
    known = [*(flag for entry in entries.values() for flag in entry.flags), "--config_file", "--output_config", "--preset"]
    problems = []
    for extra in extras:
        name = extra.split("=", 1)[0]
        if not extra.startswith("--"):
            if not problems:  # what follows an unknown flag is its value and needs no line of its own
                problems.append(f"'{extra}' stands where an option was expected; put values with spaces in quotes")
        elif name[2:] in refuse:
            problems.append(f"{name}: {refuse[name[2:]]}")
        else:
            off = [f"--no-{flag[2:]}" for entry in entries.values() if entry.is_flag for flag in entry.flags]
            problems.append(unknown(name, [*known, *off] if name.startswith(("--no-", "--no_")) else known, "option"))
    return problems


def _attempt(group: type, entries: Mapping[str, Declared], values: Mapping[str, Any], problems: list[str]) -> Any:
    own = {name: value for name, value in values.items() if entries[name].group is group}
    found: list[str] = []
    try:
        return _build(group, own, found)
    except OptionError as error:
        given_wrongly = {problem.split(" ")[0].rstrip(":") for problem in problems}
        problems += [problem for problem in error.problems if problem.split(" ")[0] not in given_wrongly]
        return None
