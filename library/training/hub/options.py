"""The options about the Hugging Face Hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from library.core.options import option
from library.core.rules import Rule

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
RepositoryType = Literal["model", "dataset", "space"]
KEEPS_STATES = ("save_state", "save_state_on_train_end", "save_state_every_n_steps")


def _uploads_nothing(values: dict[str, Any]) -> bool:
    return not values["huggingface_repo_id"]


def _keeps_no_state(values: dict[str, Any]) -> bool:
    return not any(values.get(name) for name in KEEPS_STATES)


def _asks_nothing(values: dict[str, Any]) -> bool:
    return _uploads_nothing(values) and not values["resume_from_huggingface"]


def _needs_repository(name: str) -> Rule:
    return Rule(option=name, when=_uploads_nothing, because="nothing is uploaded without --huggingface_repo_id")


@dataclass(kw_only=True, frozen=True)
class HubOptions:
    """Hugging Face Hub."""

    huggingface_repo_id: str | None = option(None, help="also upload what is saved to this repository, OWNER/NAME; made if missing")
    huggingface_repo_type: RepositoryType | None = option(None, help="kind of the repository; model where absent")
    huggingface_path_in_repo: str | None = option(None, help="folder in the repository for the files; its top where absent")
    huggingface_token: str | None = option(
        None, help="access token; better give it as HF_TOKEN or log in with `hf auth login`, for others see command lines", secret=True
    )
    huggingface_repo_visibility: Literal["public", "private"] | None = option(
        None, help="who sees a repository that is made; private where absent"
    )
    save_state_to_huggingface: bool = option(False, help="also upload the states that are saved")
    resume_from_huggingface: bool = option(False, help="--resume names a state on the hub: OWNER/NAME/FOLDER[:REVISION[:TYPE]]")
    async_upload: bool = option(False, help="upload in the background while training goes on; the end waits for it")
    RULES: ClassVar[tuple[Rule, ...]] = (
        *map(_needs_repository, ("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility")),
        *map(_needs_repository, ("save_state_to_huggingface", "async_upload")),
        Rule(
            option="huggingface_token", when=_asks_nothing, because="neither --huggingface_repo_id nor --resume_from_huggingface is given"
        ),
        Rule(
            option="save_state_to_huggingface",
            when=lambda v: not _uploads_nothing(v) and _keeps_no_state(v),
            because="no state is saved; add --save_state or --save_state_on_train_end",
        ),
        Rule(option="resume_from_huggingface", when=lambda v: not v.get("resume"), because="--resume names nothing to resume from"),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: a repository that is no OWNER/NAME, a folder that leads out of it, an empty token."""
        if self.huggingface_repo_id is not None and not REPOSITORY.fullmatch(self.huggingface_repo_id):
            yield f"--huggingface_repo_id {self.huggingface_repo_id}: write it as OWNER/NAME, for example somebody/my-lora"
        folder = self.huggingface_path_in_repo
        if folder is not None and (folder.startswith("/") or "\\" in folder or ".." in PurePosixPath(folder).parts):
            yield f"--huggingface_path_in_repo {folder}: a folder inside the repository, for example loras/cats"
        if self.huggingface_token is not None and not self.huggingface_token.strip():
            yield "--huggingface_token: is empty; leave it out to use HF_TOKEN or the stored login"
