"""The files of tokenizers, whatever the family: tables and merges, and where the hub or its cache has them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.core.log import get_logger

logger = get_logger(__name__)


def read_table(path: Path) -> dict[str, Any]:
    """A table in JSON. Raises `ValueError` naming the file for anything else."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: not a table")
    return table


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a `merges.txt`, in order."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [merge_pair(line) for line in lines if line.strip() and not line.startswith("#version")]


def merge_pair(line: str) -> tuple[str, str]:
    """The two tokens of a line of merges."""
    left, _, right = line.strip("\r").partition(" ")
    return left, right


def cache_folders(cache: Path, hub_name: str) -> list[Path]:
    """Where a cache folder may hold a tokenizer: itself, the folder that sd-scripts makes, the snapshots of a hub cache."""
    snapshots = sorted(cache.glob(f"models--{hub_name.replace('/', '--')}/snapshots/*"))
    return [cache, cache / hub_name.replace("/", "_"), *snapshots]


def hub_folder(hub_name: str, names: Sequence[str], cache: Path | None) -> Path | None:
    """The folder with these files of the hub: from its cache, else downloaded; None where neither gives them."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    problem: Exception | None = None
    for is_offline in (True, False):
        try:
            paths = [Path(hf_hub_download(hub_name, name, cache_dir=cache, local_files_only=is_offline)) for name in names]
            return paths[0].parent
        except (OSError, ValueError, HfHubHTTPError) as error:
            problem = error
    logger.info("the hub was asked for %s and did not give it: %s", hub_name, problem)
    return None
