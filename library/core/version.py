"""Which Hadron this is."""

import importlib.metadata
import subprocess
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 10  # seconds for git to answer


@cache
def hadron_version() -> str:
    """The version of this code: of its own `pyproject.toml` in a checkout, else of the installed package."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return importlib.metadata.version("hadron")


@cache
def git_commit() -> str | None:
    """The commit of a checkout in 40 hex digits, with `-dirty` behind it where tracked files differ; None where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one of another user: nothing to tell
        return None
    return answer.stdout.strip() or None
