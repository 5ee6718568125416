"""Prompt lines: `a red circle --n blurry --w 1024 --h 768 --d 1,2 --s 30 --l 7.5 --am 0.8`."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.options import Given, OptionError, option, read_group

MAX_SEED = 2**32 - 1


@dataclass(kw_only=True, frozen=True)
class LineOptions:
    """Options of one prompt line."""

    n: str | None = option(None, help="negative prompt")
    w: int | None = option(None, help="width in pixels")
    h: int | None = option(None, help="height in pixels")
    d: tuple[int, ...] = option((), help="seeds, one a picture, for example 1,2,3")
    s: int | None = option(None, help="number of steps")
    l: float | None = option(None, help="guidance scale")  # noqa: E741 - the line option's name
    am: tuple[float, ...] = option((), help="strengths of the networks, the last one repeated")

    def check(self) -> Iterable[str]:
        """What is wrong: sizes or steps below one, infinite scales and strengths."""
        yield from infinite(self, ("l", "am"))
        for name in ("w", "h", "s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"


@dataclass(kw_only=True, frozen=True)
class DrawingLine(LineOptions):
    """Options of one prompt line."""

    g: float | None = option(None, help="guidance scale, as --l")
    fs: float | None = option(None, help="flow shift")

    def check(self) -> Iterable[str]:
        """What is wrong: as for every line, a seed, shift or scale out of bounds, two guidance scales."""
        yield from super().check()
        yield from infinite(self, ("g", "fs"))
        for seed in self.d:
            yield from seed_problems("--d", seed)
        if self.fs is not None and not self.fs > 0:
            yield f"--fs {self.fs:g}: must be more than 0"
        if self.g is not None and self.l is not None:
            yield "--g and --l are the same; give one"

    @property
    def scale(self) -> float | None:
        """The guidance scale, by either name."""
        return self.l if self.g is None else self.g


@dataclass(kw_only=True, frozen=True)
class PromptLine:
    """A prompt and the options that stand behind it."""

    prompt: str
    options: LineOptions

    def strengths(self, default: tuple[float, ...]) -> tuple[float, ...]:
        """The strengths of the networks that the line asks for, the last one repeated; `default` where it does not.

        Raises `ValueError` for more strengths than there are networks.
        """
        own = self.options.am
        if own and not default:
            raise ValueError(f"--am {','.join(map(str, own))} in '{self.prompt}': there is no network whose strength it could set")
        if len(own) > len(default):
            raise ValueError(f"--am in '{self.prompt}' has {len(own)} strengths for {len(default)} networks")
        return own + own[-1:] * (len(default) - len(own)) if own else default


def parse_line(line: str, where: str, group: type[LineOptions] = LineOptions) -> PromptLine:
    """Split a prompt line at ` --name value`. Raises `OptionError` naming `where` for unknown options, bad values and broken text."""
    if any(0xD800 <= ord(character) < 0xE000 for character in line):  # what Python makes of bytes that are no UTF-8
        raise OptionError([f"{where}: not UTF-8 text"])
    text, *rest = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    given = []
    for part in rest:
        name, _, value = part.partition(" ")
        given.append(Given(name, value.strip(), f"{where}, --{name}"))
    return PromptLine(prompt=text.strip(), options=read_group(group, given, what="line option"))


def seed_problems(where: str, seed: int) -> Iterator[str]:
    """A problem for a seed that the generators of noise do not take."""
    if not 0 <= seed <= MAX_SEED:
        yield f"{where} {seed}: must lie between 0 and {MAX_SEED}"


def infinite(group: Any, names: Iterable[str]) -> Iterator[str]:
    """A problem for each of these options, numbers or lists of them, that is not finite."""
    for name in names:
        value = getattr(group, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not math.isfinite(number):
                yield f"--{name} {number:g}: must be finite"


def read_prompt_file(path: Path, group: type[LineOptions] = LineOptions, given_as: str = "--from_file") -> list[PromptLine]:
    """The prompts of a text file, one a line; empty lines and lines that begin with # are left out.

    Raises `ValueError` for a missing or non-UTF-8 file, and `OptionError` with all bad lines at once.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{given_as} {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{given_as} {path}: cannot be read as UTF-8 text ({error})") from None
    prompts, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            prompts.append(parse_line(line, f"{path} line {number}", group))
        except OptionError as error:
            problems += error.problems
    if problems:
        raise OptionError(problems)
    if not prompts:
        raise ValueError(f"{given_as} {path}: holds no prompt")
    return prompts
