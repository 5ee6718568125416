"""Folders that diffusers and transformers write: one folder a model, with a `config.json` and safetensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16", ".bf16", ".fp32")


def read_config(folder: Path, classes: tuple[str, ...], what: str, hint: str) -> dict[str, Any]:
    """The configuration of one model, which must be of one of these classes, the first of them being the usual one.

    Raises `ValueError` naming the file: missing (with `hint`), broken, or of another class than `what` (half a sentence) is.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a table")
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), classes[0])
    if name not in classes:
        raise ValueError(f"{path}: is a {name}; {what} is a {classes[0]}")
    return config


def built(folder: Path, build: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """The empty model that the configuration of `folder` describes. Raises `ValueError`, naming the file where its class cannot take it."""
    try:
        return build(config)
    except ValueError:  # of ours, which says all
        raise
    except Exception as error:  # the libraries' classes fail in many ways
        raise ValueError(f"cannot be made as {folder / 'config.json'} says: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of one model, whole or in shards. Raises `ValueError` naming the folder that has none."""
    for stem in (stem + variant for variant in VARIANTS for stem in STEMS):
        files = [folder / f"{stem}.safetensors"]
        files = files if files[0].is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if files:
            return files
    raise ValueError(f"{folder}: has no safetensors file of weights ({', '.join(f'{stem}.safetensors' for stem in STEMS)})")
