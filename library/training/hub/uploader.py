"""Uploading what a run saves: at once, or in the background while training goes on."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.core.log import get_logger
from library.training.hub.options import HubOptions
from library.training.hub.repository import Repository, reason

logger = get_logger(__name__)

MOST_WAITING = 4  # files in the background; when there are more, the line is slower than the run, and the rest is left for the end
LOOK_AGAIN = 1.0  # seconds; some systems hear Ctrl+C only between waits

Kind = Literal["network", "state"]


class Uploader:
    """Sends saved files to a repository in the order in which they come, and no failure of it ends a run.

    A run waits for it in `finish`, and in `send` where it does not work in the background. As a context it finishes however the run
    ends; after Ctrl+C it only says what is not uploaded.
    """

    def __init__(self, repository: Repository, *, in_background: bool, with_states: bool) -> None:
        self._repository, self._in_background, self._with_states = repository, in_background, with_states
        self._waiting: deque[Path] = deque()  # the first is on its way
        self._late: list[Path] = []  # failed, or came while too many waited
        self._removals: dict[Path, Callable[[], None]] = {}  # of files that wait
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, options: HubOptions, processes: int = 1) -> "Uploader | None":
        """The uploader that the options ask for, its repository proved writable; to be made by one process, before models are loaded.

        Among several processes it works in the background in any case: the others would give up waiting for a long upload.
        Raises `ValueError` for a repository that cannot be used.
        """
        repository = Repository.opened(options)
        if repository is None:
            return None
        return cls(repository, in_background=options.async_upload or processes > 1, with_states=options.save_state_to_huggingface)

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._tell_left([*self._waiting, *self._late])
        else:
            self.finish()

    def send(self, path: Path, kind: Kind) -> None:
        """Upload a file or folder that is safe on disk; a state only where that was asked for. A failure is a warning, with the reason."""
        if kind == "state" and not self._with_states:
            return
        if not self._in_background:
            self._upload(path)
            return
        with self._changed:
            if len(self._waiting) < MOST_WAITING:
                self._waiting.append(path)
                self._changed.notify_all()
            else:
                logger.warning("uploads are slower than saving: %s goes up at the end", path.name)
                self._late.append(path)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()

    def release(self, path: Path, remove: Callable[[], None]) -> None:
        """Call `remove` for a file that the run no longer keeps: now, or in the background once it is sent, if its turn is near.

        What was left for the end is given up, and said: the files that a run keeps stay as few as it was told.
        """
        with self._changed:
            if path in self._waiting:
                self._removals[path] = remove
                return
            self._give_up(path)
        remove()

    def finish(self) -> list[Path]:
        """Wait for what is on its way, and try what failed or was left; returns what could not be uploaded, which is warned about.

        May be called more than once. Ctrl+C ends the wait; what is not uploaded by then is named.
        """
        try:
            if self._waiting:
                logger.info("waiting for uploads: %s", _names(self._waiting))
            self._wait_until(lambda: not self._waiting)
            for path in list(self._late):
                self._upload(path)
        except KeyboardInterrupt:
            self._tell_left([*self._waiting, *self._late])
            raise
        self._tell_left(self._late)
        return list(self._late)

    def _work(self) -> None:
        while True:
            self._wait_until(lambda: bool(self._waiting))
            path = self._waiting[0]
            self._upload(path)
            while (remove := self._removal(path)) is not None:
                try:
                    remove()
                except OSError as error:
                    logger.warning("cannot remove %s (%s)", path, error.strerror or error)

    def _removal(self, path: Path) -> Callable[[], None] | None:
        """What is still to be done to a file that was tried; None where that is all, and the next one has its turn."""
        with self._changed:
            remove = self._removals.pop(path, None)
            if remove is not None:
                self._give_up(path)
            else:
                self._waiting.popleft()
                self._changed.notify_all()
            return remove

    def _upload(self, path: Path) -> None:
        started = time.monotonic()
        try:
            self._repository.upload(path)
        except Exception as error:  # whatever the network, the hub or a missing file make of it: training goes on, `finish` tries again
            logger.warning("cannot upload %s to %s (%s)", path.name, self._repository.name, reason(error))
            if path not in self._late:
                self._late.append(path)
            return
        if path in self._late:
            self._late.remove(path)
        logger.info("uploaded %s to %s (%.0f s)", path.name, self._repository.name, time.monotonic() - started)

    def _give_up(self, path: Path) -> None:
        if path in self._late:
            self._late.remove(path)
            logger.warning("%s is no longer kept, and was not uploaded to %s", path.name, self._repository.name)

    def _tell_left(self, paths: Iterable[Path]) -> None:
        if names := _names(paths):
            logger.warning("not uploaded to %s: %s; on disk all is safe, and `hf upload` sends it", self._repository.name, names)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            while not holds():
                self._changed.wait(LOOK_AGAIN)


def uploader_of_run(options: HubOptions, accelerator: Accelerator) -> Uploader | None:
    """The uploader of a run, which its main process has. Every rank calls this.

    Raises `ValueError` on every rank for a repository that cannot be used.
    """
    uploader: Uploader | None = None
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            uploader = Uploader.of(options, accelerator.num_processes)
        except ValueError as error:
            found = [str(error)]
    [problem] = broadcast_object_list(found)
    if problem is not None:
        raise ValueError(problem)
    return uploader


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
