"""What the doctor finds, and what it was asked to look at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor: what was looked at, how it is, and what to do where it is not well."""

    level: Level
    subject: str
    text: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is looked at besides the machine: devices, the folders that a run would use, arguments of a training script."""

    devices: tuple[torch.device, ...]
    folders: tuple[Path, ...]
    family: str | None = None
    arguments: tuple[str, ...] = ()  # of the family's training script; empty where none were given


Check = Callable[[Patient], Iterator[Finding]]


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding(level="ok", subject=subject, text=text)


def warn(subject: str, text: str, advice: str) -> Finding:
    """Training works, but not as it could."""
    return Finding(level="warn", subject=subject, text=text, advice=advice)


def fail(subject: str, text: str, advice: str) -> Finding:
    """Training, or what was asked of it, does not work."""
    return Finding(level="fail", subject=subject, text=text, advice=advice)


def gigabytes(count: float) -> str:
    """Bytes for readers."""
    return f"{count / 2**30:.1f} GB"


def first_line(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
