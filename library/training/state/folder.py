"""The folder of a state on disk: staged beside its place, described by a manifest with hashes that is written last, then renamed.

Format 1: `manifest.json`, `content.json` (all that is no tensor) and a safetensors file for each part that has tensors.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from library.core.atomic import sync_folder, write_text
from library.core.file_hash import file_sha256
from library.core.log import get_logger
from library.training.optimizing.average import AVERAGED

logger = get_logger(__name__)

FORMAT = 1
MANIFEST, CONTENT = "manifest.json", "content.json"
PART, ASIDE, GONE = ".part", ".old", ".gone"  # endings of what is being written, replaced, and removed
Kind = Literal["step", "epoch", "end", "interrupted", "rolling"]
Stands = Literal["step", "epoch"]


class BrokenState(ValueError):
    """A state that is not whole: the file, and what is wrong with it."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileFacts":
        """Those of a file as it is."""
        return cls(path.stat().st_size, file_sha256(path))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a state is of, and what files it has."""

    format: int = FORMAT
    made_by: str
    kind: Kind
    stands: Stands  # what had just been done: an optimizer step, or an epoch
    step: int
    epoch: int
    saved_at: float  # seconds since 1970
    session: str
    seed: int
    identity: Mapping[str, Any]
    files: Mapping[str, FileFacts]

    @property
    def age(self) -> tuple[float, int, bool]:
        """What says which of two states is newer."""
        return self.saved_at, self.step, self.stands == "epoch"

    def text(self) -> str:
        """As it stands in the file, its own digest last, so that no bit of it can change unseen."""
        body = asdict(self)
        return _rendered({**body, "digest": _digest(body)})

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """Read what `text` made. Raises `ValueError` for anything else."""
        body = json.loads(text)
        if not isinstance(body, dict):
            raise ValueError("it is no JSON object")
        if body.get("format") != FORMAT:
            raise ValueError(f"it is of format {body.get('format')}, and this version reads {FORMAT}")
        digest = body.pop("digest", None)
        if digest != _digest(body) or text != _rendered({**body, "digest": digest}):
            raise ValueError("its content is not what its digest says; it was changed or damaged")
        files = {name: FileFacts(**facts) for name, facts in body.pop("files").items()}
        return cls(**body, files=files)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a state. Raises `BrokenState` where there is none, or it was damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenState(f"{path}: missing; the state was never finished, or is none") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BrokenState(f"{path}: damaged: {error}") from None


def verified(folder: Path) -> Manifest:
    """The manifest of a state of which every file is as it was written. Raises `BrokenState` naming every file that is not."""
    manifest = read_manifest(folder)
    found = [problem for name, facts in manifest.files.items() if (problem := _problem(folder / name, facts))]
    if found:
        raise BrokenState("\n".join(found))
    return manifest


@contextmanager
def staged_state(place: Path) -> Iterator[Path]:
    """Yield a folder beside `place` to write a state into; on success it is verified and put there, on any error removed.

    A state that stood there stays whole until the new one is. Raises `BrokenState` where the disk did not keep what was written.
    """
    part = _hidden(place, PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        verified(part)
        sync_folder(part)
        put_in_place(part, place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def put_in_place(part: Path, place: Path) -> None:
    """Rename a finished folder to its place. What stood there is moved aside, and removed once the new one stands."""
    aside = _hidden(place, ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    if place.exists():
        os.replace(place, aside)
    os.replace(part, place)
    sync_folder(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last of a state's files."""
    write_text(folder / MANIFEST, manifest.text())


def tidy(names: "StateNames") -> None:
    """Clear up what a run that was killed left: unfinished states and files go, and a state that was moved aside comes back."""
    for path in sorted(names.folder.glob(".*")) if names.folder.is_dir() else ():
        place = path.with_name(path.stem[1:])
        if path.suffix == ASIDE and names.owns(place.name) and not _is_whole(place) and _is_whole(path):
            shutil.rmtree(place, ignore_errors=True)
            os.replace(path, place)
            logger.warning("%s: stood aside when a run was ended while it replaced it; it is back", place)
        elif path.suffix in (PART, ASIDE, GONE) and path.is_dir() and names.owns(place.name):
            shutil.rmtree(path, ignore_errors=True)
            logger.info("removed %s: left by a run that was ended while it saved", path)
        elif path.is_file() and names.owns_part(path.name):
            path.unlink()
            logger.info("removed %s: left by a run that was ended while it saved", path)


def remove_state(folder: Path) -> None:
    """Remove a state: renamed first, so that what is left of it after a kill is taken for none."""
    gone = _hidden(folder, GONE)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


class StateNames:
    """The names of a run's states, as sd-scripts has them: those of its files with `-state` behind."""

    def __init__(self, folder: Path, output_name: str | None) -> None:
        self.folder, self._name = folder, output_name

    def place(self, kind: Kind, *, step: int, epoch: int) -> Path:
        """The folder of a state."""
        if kind == "end":
            return self.folder / f"{self._name or 'last'}-state"
        if kind == "epoch":
            return self.folder / f"{self._name or 'epoch'}-{epoch:06d}-state"
        return self.folder / f"{self._name or 'at'}-step{step:08d}-state"

    def owns(self, name: str) -> bool:
        """Is this the name of a state of such a run?"""
        last, epoch, step = (re.escape(self._name or other) for other in ("last", "epoch", "at"))
        return re.fullmatch(rf"{last}-state|{epoch}-\d{{6,}}-state|{step}-step\d{{8,}}-state", name) is not None

    def owns_part(self, name: str) -> bool:
        """Is this the name of a network file of such a run that was being written (see `core.atomic.staged`)?"""
        last, epoch, step = (re.escape(self._name or other) for other in ("last", "epoch", "at"))
        stem = rf"(?:{last}|{epoch}-\d{{6,}}|{step}-step\d{{8,}})(?:{AVERAGED})?"
        return re.fullmatch(rf"\.{stem}\.safetensors\.[0-9a-f]{{8}}\.part", name) is not None

    def all(self) -> list[Path]:
        """The states that there are, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if path.is_dir() and self.owns(path.name))


# One file, one folder


def _problem(path: Path, facts: FileFacts) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != facts.size:
        return f"{path}: {'truncated' if size < facts.size else 'longer than it was written'}: {size} bytes of {facts.size}"
    return None if file_sha256(path) == facts.sha256 else f"{path}: damaged: its content is not what was written (SHA-256)"


def _is_whole(folder: Path) -> bool:
    try:
        verified(folder)
    except BrokenState:
        return False
    return True


def _hidden(place: Path, ending: str) -> Path:
    return place.with_name(f".{place.name}{ending}")


def _rendered(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(body).encode("utf-8")).hexdigest()
