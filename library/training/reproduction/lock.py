"""The lock file of a run: everything that is needed to make it again. Written at its start, read by `--reproduce`.

A TOML file: `[run]`, `[options]` (those that differ from their defaults, the drawn seed among them), `[defaults]` (all others),
`[versions]`, `[hardware]`, `[environment]`, and a table for each input. Secrets are in none of them.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from library.core.atomic import write_text
from library.core.clock import dated
from library.core.command_line import OptionSet
from library.core.config_file import read_toml, toml_value
from library.core.log import get_logger
from library.core.options import declared
from library.training.reproduction.inputs import Input

logger = get_logger(__name__)

LOCK = "lock.toml"
RESUMED = "lock-resumed.toml"  # of the last session that took the run up again
FORMAT = 1
OF_THE_PROCESS = (
    "reproduce", "allow_reproduce_mismatch", "resume", "allow_resume_mismatch", "resume_from_huggingface", "save_state_to_huggingface",
    "async_upload", "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility",
)  # fmt: skip
"""Options that say how this process came to the run and whom it sends the files, not what the run is."""

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
HIDDEN = "(secret)"


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What a lock file says."""

    run: Mapping[str, Any]  # family, seed, processes, steps, steps_per_epoch, started, command, folder
    options: Mapping[str, Any]
    defaults: Mapping[str, Any]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    environment: Mapping[str, str]
    inputs: Mapping[str, Input]

    def text(self) -> str:
        """As TOML. What is None is left out."""
        blocks = ["# How this run was made. --reproduce with this file makes it again.", f"format = {FORMAT}"]
        for field in dataclasses.fields(self):
            table: Mapping[str, Any] = getattr(self, field.name)
            if field.name != "inputs":
                blocks.append(_table(field.name, table))
        blocks += [_table(f"inputs.{_key(name)}", asdict(found)) for name, found in self.inputs.items()]
        return "\n\n".join(blocks) + "\n"

    @classmethod
    def read(cls, path: Path, where: str = "--reproduce") -> "Lock":
        """The lock file at `path`. Raises `ValueError` naming `where` and the file for one that is none."""
        table, _ = read_toml(path, where)
        if table.get("format") != FORMAT:
            raise ValueError(f"{where} {path}: not a lock file of this version (its format is {table.get('format')}, not {FORMAT})")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if not isinstance(table.get(name, {} if name == "inputs" else None), dict)]
        if missing:
            raise ValueError(f"{where} {path}: has no [{missing[0]}]; it is cut off or was changed")
        try:
            inputs = {name: Input(**found) for name, found in table.get("inputs", {}).items()}
        except TypeError as error:
            raise ValueError(f"{where} {path}: its inputs are damaged ({error})") from error
        return cls(**{name: table[name] for name in names if name != "inputs"}, inputs=inputs)


def split_options(options: OptionSet, settled: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run that differ from their defaults, and all others; `settled` holds what was drawn, such as the seed."""
    values = options.values() | dict(settled)
    differing: dict[str, Any] = {}
    same: dict[str, Any] = {}
    for entry in (entry for group in options.groups for entry in declared(group)):
        if entry.name in values and entry.name not in OF_THE_PROCESS:
            value = values[entry.name]
            is_default = value == entry.default and not entry.required
            (same if is_default else differing)[entry.name] = "none" if value is None and not is_default else value
    return differing, same


def without_secrets(argv: Sequence[str], options: OptionSet) -> list[str]:
    """A command line with the values of secret options hidden."""
    flags = {flag for group in options.groups for entry in declared(group) if entry.is_secret for flag in entry.flags}
    shown: list[str] = []
    for index, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in flags and value:
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(HIDDEN if index and argv[index - 1] in flags else word)
    return shown


def of_the_moment(command: Sequence[str]) -> dict[str, Any]:
    """What `[run]` says of this start: when, the command from its script on, and the folder that its paths are relative to."""
    return {"started": dated("%Y-%m-%dT%H:%M:%S"), "command": list(command), "folder": str(Path.cwd())}


def write_lock(lock: Lock, folder: Path, *, resumes: bool) -> Path:
    """Write the lock file into a run's folder, atomically; returns it.

    That of an earlier run of this name is kept as `lock-1.toml`, `lock-2.toml`, ..., and that of its last session beside it as
    `lock-1-resumed.toml`; a session that `resumes` leaves the run's own file and writes `lock-resumed.toml`.
    Raises `ValueError` where it cannot be written.
    """
    path = folder / LOCK
    try:
        if path.exists() and resumes:
            path = folder / RESUMED
        elif path.exists():
            aside = next(free for number in count(1) if not (free := folder / f"lock-{number}.toml").exists())
            path.rename(aside)
            if (folder / RESUMED).exists():
                (folder / RESUMED).rename(aside.with_stem(f"{aside.stem}-resumed"))
        write_text(path, lock.text().encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        raise ValueError(f"{path}: the lock file cannot be written ({error.strerror or error})") from error
    return path


def _table(name: str, table: Mapping[str, Any]) -> str:
    lines = [f"{_key(key)} = {toml_value(value)}" for key, value in table.items() if value is not None]
    return "\n".join([f"[{name}]", *lines])


def _key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else json.dumps(name)
