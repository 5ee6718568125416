"""A state of a few bytes, for tests of what happens to its folder."""

from pathlib import Path
from typing import Any

import torch

from library.training.state.folder import Kind, Manifest
from library.training.state.saving import write_state


def small_manifest(step: int = 1, **others: Any) -> Manifest:
    """A manifest without files."""
    facts: dict[str, Any] = {
        "made_by": "test", "kind": "step", "stands": "step", "step": step, "epoch": 1, "saved_at": float(step), "session": "7",
        "seed": 1, "identity": {"family": "toy", "learning_rate": 0.1}, "files": {},
    }  # fmt: skip
    return Manifest(**(facts | others))


def small_state(place: Path, step: int = 1, *, kind: Kind = "step", size: int = 8, **others: Any) -> Path:
    """A state of three files in its place."""
    content = {"weights": {"a": torch.arange(size, dtype=torch.float32) + step}, "place": {"step": step}}
    write_state(place, content, small_manifest(step, kind=kind, **others))
    return place
