"""Presets: option files for cards of one size, in the folder `presets` of each family; `--preset NAME_OR_FILE`."""

from pathlib import Path

import library.models
from library.models.naming import Naming


def presets(arch: Naming) -> dict[str, Path]:
    """The presets of a family by name (`8gb`, `12gb`, ...), smallest card first."""
    folder = Path(library.models.__path__[0]) / arch.name / "presets"
    found = {file.stem: file for file in folder.glob("*.toml")}
    return dict(sorted(found.items(), key=lambda entry: (len(entry[0]), entry[0])))
