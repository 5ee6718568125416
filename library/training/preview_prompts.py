"""The prompts of previews: text files of prompt lines, and the tables of TOML and JSON files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.config_file import read_toml
from library.core.options import Given, OptionError, option, read_group
from library.core.spelling import unknown
from library.diffusion.samplers import SamplerName
from library.inference.prompts import DrawingLine, PromptLine, parse_line, read_prompt_file

GIVEN_AS = "--sample_prompts"
KEYS = {
    "negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "sample_steps": "s", "scale": "l", "guidance_scale": "g",
    "sample_sampler": "ss", "flow_shift": "fs",
}  # fmt: skip
"""What a table of a TOML or JSON file says beside its `prompt` -> the line option that says the same."""


@dataclass(kw_only=True, frozen=True)
class PreviewLine(DrawingLine):
    """Options of one prompt line of previews."""

    ss: SamplerName | None = option(None, help="sampler; that of --sample_sampler where absent")


def read_preview_prompts(path: Path) -> list[PromptLine]:
    """The prompts of a `.txt`, `.toml` or `.json` file, with their options (a `PreviewLine` each).

    TOML has the options that all prompts share in `[prompt]`, and one `[[prompt.subset]]` a prompt, which wins over the shared ones. JSON
    has a list of such tables or of prompt lines. Raises `ValueError` for a file that cannot be read, and `OptionError` with every problem.
    """
    kind = path.suffix.lower()
    if kind == ".toml":
        return _lines(path, _toml_prompts(path))
    return _lines(path, _json_prompts(path)) if kind == ".json" else read_prompt_file(path, PreviewLine, GIVEN_AS)


# TOML and JSON


def _toml_prompts(path: Path) -> list[Any]:
    table = read_toml(path, GIVEN_AS)[0]
    shared = table.get("prompt")
    if not isinstance(shared, dict) or len(table) != 1:
        raise ValueError(f"{GIVEN_AS} {path}: needs one table [prompt], and a [[prompt.subset]] for every prompt")
    shared = dict(shared)
    subsets = shared.pop("subset", [{}])
    if not isinstance(subsets, list):
        raise ValueError(f"{GIVEN_AS} {path}: subset must be a list of tables: write [[prompt.subset]] in two brackets")
    return [shared | subset if isinstance(subset, dict) else subset for subset in subsets]


def _json_prompts(path: Path) -> list[Any]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{GIVEN_AS} {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{GIVEN_AS} {path}: cannot be read as JSON ({error})") from None
    if not isinstance(prompts, list):
        raise ValueError(f"{GIVEN_AS} {path}: needs a list of prompts, each a text or a table")
    return prompts


def _lines(path: Path, prompts: Iterable[Any]) -> list[PromptLine]:
    lines, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        where = f"{path} prompt {number}"
        try:
            lines.append(parse_line(prompt, where, PreviewLine) if isinstance(prompt, str) else _of_table(prompt, where))
        except OptionError as error:
            problems += [problem if problem.startswith(where) else f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise OptionError(problems)
    if not lines:
        raise ValueError(f"{GIVEN_AS} {path}: holds no prompt")
    return lines


def _of_table(table: Any, where: str) -> PromptLine:
    if not isinstance(table, Mapping) or not isinstance(table.get("prompt"), str):
        raise OptionError([f"{where}: needs a text under 'prompt'"])
    given = {key: value for key, value in table.items() if key != "prompt" and value is not None}
    problems = [f"{where}: {unknown(key, KEYS, 'key')}" for key in given if key not in KEYS]
    if problems:
        raise OptionError(problems)
    values = [Given(KEYS[key], value, f"{where} ({key})", is_typed=True) for key, value in given.items()]
    return PromptLine(prompt=table["prompt"], options=read_group(PreviewLine, values, what="line option"))
