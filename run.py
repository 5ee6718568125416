"""Set Hadron up and run it: `python run.py demo`, `test`, `check` or `setup`. Standard library only.

Each command makes the virtual environment `.venv` and installs the pinned requirements first, where that is not yet done.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
RUN_WITH, TEST_WITH, TEST_ALONE = "requirements.txt", "requirements-test.txt", "requirements-test-nodeps.txt"


def main() -> int:
    """Parse the command line, set up what the command needs, run it; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, help="; ".join(f"{name}: {command.__doc__}" for name, command in COMMANDS.items()))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments for the demo or pytest")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        sys.exit(f"Hadron needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    if arguments.rest and arguments.command not in ("demo", "test"):
        parser.error(f"{arguments.command} takes no arguments; {' '.join(arguments.rest)} was given")
    return COMMANDS[arguments.command](arguments.rest)


def setup(rest: list[str]) -> int:
    """make .venv and install everything that training and generation need"""
    install(RUN_WITH)
    print(f"ready: {PYTHON.relative_to(ROOT)} runs the scripts")
    return 0


def demo(rest: list[str]) -> int:
    """teach the small built-in model a new look, draw with and without it, show the picture"""
    install(RUN_WITH)
    return call("-m", "tools.demo", *rest)


def test(rest: list[str]) -> int:
    """run the whole test suite (arguments go to pytest)"""
    install(TEST_WITH, alone=TEST_ALONE)
    workers = min(4, os.cpu_count() or 1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the processors
    return call("-m", "pytest", *(rest or ["-n", str(workers)]))


def check(rest: list[str]) -> int:
    """check format, lint and types"""
    install(TEST_WITH, alone=TEST_ALONE)
    steps = (["-m", "ruff", "format", "--check", "."], ["-m", "ruff", "check", "."], ["-m", "pyright"])
    return max(call(*step) for step in steps)


def install(requirements: str, alone: str | None = None) -> None:
    """Make the virtual environment and install a requirements file, once for each content of it; `alone` without its dependencies."""
    files = [name for name in (requirements, alone) if name]
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in (RUN_WITH, *files))).hexdigest()
    stamp = VENV / f".installed-{requirements}"
    if stamp.is_file() and stamp.read_text() == wanted and PYTHON.exists():
        return
    if not PYTHON.exists():
        print("making .venv", flush=True)
        venv.create(VENV, with_pip=True)
    print(f"installing {' and '.join(files)} (the first time takes some minutes)", flush=True)
    pip("install", "-r", requirements)
    if alone:
        pip("install", "--no-deps", "-r", alone)
    stamp.write_text(wanted)


def pip(*arguments: str) -> None:
    """Run pip in the virtual environment; stop with its message where it fails."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit("the installation failed; see pip's message above")


def call(*arguments: str) -> int:
    """Run Python of the virtual environment in the project folder; returns its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([str(PYTHON), *arguments], cwd=ROOT, env=environment).returncode


COMMANDS = {"demo": demo, "test": test, "check": check, "setup": setup}

if __name__ == "__main__":
    sys.exit(main())
