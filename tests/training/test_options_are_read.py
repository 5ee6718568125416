"""Every declared option means something: the code reads it somewhere besides its declaration and its check."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from library.core.options import declared
from library.inference import script as generation
from library.inference.minimal import script as minimal
from library.models.architecture import architecture_named, architecture_names
from library.training.metadata import OPTION_ENTRIES, SPEC_TEXTS
from library.training.run import option_groups

ROOT = Path(__file__).parents[2]
ALWAYS_SO = {
    "sdpa": "torch's scaled_dot_product_attention is what there is without --attn_mode",
    "sdxl": "the script draws with SDXL only",
    "save_model_as": "one choice",
    "vae_disable_cache": "a rule says that it has no effect",
    "skip_until_initial_step": "data before the place where a run begins is always left out",
    "qwen_image_vae_2d": "a rule says that it has no effect",
}
"""Options that are accepted for sd-scripts' commands and say what is so anyway -> why."""
WRITTEN = {*OPTION_ENTRIES, *(f"metadata_{name}" for name in SPEC_TEXTS)}
"""Options that may do nothing but stand in the metadata, where their names say so."""


def every_option() -> set[str]:
    groups = {group for name in architecture_names() for group in option_groups(architecture_named(name))}
    groups |= {*generation.option_groups(architecture_named("sdxl")), *minimal.option_groups(architecture_named("anima"))}
    return {entry.name for group in groups for entry in declared(group)}


@cache
def names_read() -> frozenset[str]:
    files = [file for folder in ("library", "networks") for file in (ROOT / folder).rglob("*.py")]
    return frozenset(name for file in files for name in _read_in(ast.parse(file.read_text(encoding="utf-8"))))


def _read_in(node: ast.AST) -> Iterator[str]:
    """Attributes that are read and texts that may name one, without checks and rules, which give an option no effect."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and child.name == "check":
            continue
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "Rule":
            continue
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield child.attr
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        yield from _read_in(child)


@pytest.mark.parametrize("name", sorted(every_option()))
def test_every_option_is_read(name: str) -> None:
    is_written = name in WRITTEN and name.startswith(("metadata_", "training_comment"))
    is_read = name in names_read()
    assert is_read or is_written or name in ALWAYS_SO


def test_an_option_that_nobody_reads_would_be_found() -> None:
    assert "an_option_that_nobody_reads" not in names_read() and "gradient_accumulation_steps" in names_read()
