"""A repository of the hub: proved writable before a run, and given files while it goes on."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from library.core.log import get_logger
from library.core.secrets import hidden, keep_secret
from library.training.hub.options import HubOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = get_logger(__name__)

LONGEST_REASON = 300  # letters
NO_TOKEN = "no access token: set HF_TOKEN, or log in with `hf auth login`, with a token that may write"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Where a run's files go on the hub."""

    api: "HfApi"  # holds the token
    name: str  # OWNER/NAME
    kind: Literal["model", "dataset", "space"] = "model"
    folder: str = ""  # in the repository

    @classmethod
    def opened(cls, options: HubOptions) -> "Repository | None":
        """The repository of `--huggingface_repo_id`, made if missing and proved writable; None where nothing is to be uploaded.

        Raises `ValueError` where there is no token, no way to the hub, no right to write, or others would see what shall be private.
        """
        if options.huggingface_repo_id is None:
            return None
        api = hub_api(options)
        if not api.token:
            raise ValueError(f"--huggingface_repo_id {options.huggingface_repo_id}: {NO_TOKEN}")
        repository = cls(
            api=api,
            name=options.huggingface_repo_id,
            kind=options.huggingface_repo_type or "model",
            folder=(options.huggingface_path_in_repo or "").strip("/"),
        )
        repository.prepare(options.huggingface_repo_visibility)
        return repository

    def prepare(self, visibility: Literal["public", "private"] | None) -> None:
        """Make the repository if it is missing, and prove that the token may write to it. Raises `ValueError` as `opened` says."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            try:
                self.api.auth_check(self.name, repo_type=self.kind, write=True)
                is_private = bool(self.api.repo_info(self.name, repo_type=self.kind).private)
            except RepositoryNotFoundError as error:
                if isinstance(error, GatedRepoError):
                    raise
                self._make(is_private=visibility != "public")
                return
        except Exception as error:  # the library's, its HTTP client's and the system's have no common base
            raise ValueError(f"--huggingface_repo_id {self.name}: cannot write there ({reason(error)})") from None
        if visibility == "private" and not is_private:
            raise ValueError(
                f"--huggingface_repo_visibility private: {self.name} is public, and its visibility is only changed on its page; "
                "make it private there, or name another repository"
            )
        if visibility == "public" and is_private:
            logger.warning("--huggingface_repo_visibility public: %s is private and stays so; change it on its page", self.name)

    def upload(self, path: Path) -> None:
        """Upload a file, or a folder in place of an earlier one of its name. Raises whatever the hub's library does."""
        place = str(PurePosixPath(self.folder) / path.name)
        if path.is_dir():
            self.api.upload_folder(
                repo_id=self.name, repo_type=self.kind, folder_path=path, path_in_repo=place,
                delete_patterns=["*"], commit_message=f"Upload {path.name}",
            )  # fmt: skip
        else:
            self.api.upload_file(
                repo_id=self.name, repo_type=self.kind, path_or_fileobj=path, path_in_repo=place, commit_message=f"Upload {path.name}"
            )

    def _make(self, *, is_private: bool) -> None:
        sdk = "static" if self.kind == "space" else None  # a space must have one, and this one runs nothing
        self.api.create_repo(self.name, repo_type=self.kind, private=is_private, exist_ok=True, space_sdk=sdk)
        logger.info("made the %s repository %s on the hub", "private" if is_private else "public", self.name)


def hub_api(options: HubOptions) -> "HfApi":
    """The hub's library with the token of the options, of HF_TOKEN or of the stored login, which is kept secret from now on."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # the run has one
    token = options.huggingface_token or get_token()
    keep_secret([token])
    return HfApi(token=token, library_name="hadron")


def reason(error: Exception) -> str:
    """An error of the hub in one line without secrets."""
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception) and not hasattr(causes[-1], "response"):  # the hub's own answers say it all
        causes.append(causes[-1].__cause__)
    words = ": ".join(" ".join(str(cause).split()) or type(cause).__name__ for cause in causes)
    return hidden(words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]}...")
