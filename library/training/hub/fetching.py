"""A state on the hub, brought here to resume from: `--resume OWNER/NAME/FOLDER[:REVISION[:TYPE]] --resume_from_huggingface`."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast, get_args

from library.core.log import get_logger
from library.core.spelling import nearest
from library.training.hub.options import HubOptions, RepositoryType
from library.training.hub.repository import hub_api, reason

logger = get_logger(__name__)

FORM = "OWNER/NAME/FOLDER, OWNER/NAME/FOLDER:REVISION or OWNER/NAME/FOLDER:REVISION:TYPE"


@dataclass(frozen=True, kw_only=True)
class StateAddress:
    """Where on the hub a state stands."""

    repository: str
    folder: str  # empty for the whole repository
    revision: str | None = None
    kind: RepositoryType = "model"

    @classmethod
    def parse(cls, text: str) -> "StateAddress":
        """Read an address as sd-scripts writes it. Raises `ValueError` with the forms there are."""
        place, *rest = text.split(":")
        owner, _, tail = place.partition("/")
        name, _, folder = tail.partition("/")
        kind = rest[1] if len(rest) > 1 else "model"
        parts = PurePosixPath(folder).parts
        if not owner or not name or len(rest) > 2 or ".." in parts or kind not in get_args(RepositoryType):
            raise ValueError(f"--resume {text}: with --resume_from_huggingface it is {FORM}; TYPE is {', '.join(get_args(RepositoryType))}")
        revision = (rest[0] if rest else "") or None
        return cls(repository=f"{owner}/{name}", folder="/".join(parts), revision=revision, kind=cast(RepositoryType, kind))


def fetch_state(options: HubOptions, resume: str, folder: Path) -> Path:
    """Download the state that `resume` names to below `folder`, and return its folder.

    What is there already is not loaded again, and processes that ask at once wait for each other, so every rank may call it.
    Raises `ValueError` for an address that is none, a repository that cannot be read, and a state that it does not hold.
    """
    address = StateAddress.parse(resume)
    api = hub_api(options)
    try:
        files = api.list_repo_files(address.repository, repo_type=address.kind, revision=address.revision)
        if not any(_is_below(file, address.folder) for file in files):
            raise ValueError(f"{address.repository} holds nothing there{_states_among(files, address.folder)}")
        logger.info("fetching %s from the hub", resume)
        root = api.snapshot_download(
            address.repository, repo_type=address.kind, revision=address.revision,
            local_dir=folder / address.repository / (address.revision or "main"),
            allow_patterns=f"{address.folder}/*" if address.folder else None,
        )  # fmt: skip
    except Exception as error:  # the library's, its HTTP client's and the system's have no common base
        raise ValueError(f"--resume {resume}: {reason(error)}") from None
    return Path(root) / address.folder


def _is_below(file: str, folder: str) -> bool:
    return not folder or file.startswith(f"{folder}/")


def _states_among(files: list[str], asked: str) -> str:
    """What the repository has instead, for an error."""
    folders = sorted({str(PurePosixPath(file).parent) for file in files} - {"."})
    near = nearest(asked, folders)
    if near is not None:
        return f"; did you mean {near}?"
    return f"; its folders are {', '.join(folders[:8])}" if folders else "; it has no folders"
