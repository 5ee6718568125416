"""The processes of a run: how they wait for each other without a collective, and how they hear of one that failed.

A collective has a timeout (of NCCL ten minutes), and all ranks end when one of them is late. What a rank does alone (encoding its share of
a cache, drawing previews, writing a file) may take as long as it takes: the others wait here, for as long as it gives signs of life. All
goes through the key-value store that torch's process group was made with.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from accelerate import Accelerator
from torch import distributed

from library.core.log import get_logger

logger = get_logger(__name__)

EXIT_PEER_FAILED = 76  # EX_PROTOCOL of sysexits.h, "remote error in protocol": this process did nothing wrong
PATIENCE = 300.0  # seconds without a sign of life, after which a rank is taken for dead
BEAT = 1.0  # seconds from one sign of life to the next
GRACE = 3.0  # seconds in which a rank that hears of another's failure may end by an error of its own
LAST_WORDS = 2.0  # seconds for the failed rank to print its error: a launcher ends all processes as soon as the first of them is gone
TOLD = 60.0  # seconds of waiting after which the log says for whom


class Team:
    """The ranks of a run. Of one process alone all methods return at once."""

    _made: ClassVar[int] = 0

    def __init__(self, rank: int, world: int, store: "distributed.Store | None", *, patience: float = PATIENCE) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self._store: Any = None if store is None or world == 1 else distributed.PrefixStore(f"hadron/{Team._made}", store)
        Team._made += 1  # every rank makes the same teams in the same order
        self._meetings = 0
        self._leaves = threading.Event()
        if self._store is not None:
            self._store.set(_beat(rank), "0")
            self._store.set(_place(rank), _written(0, "start"))

    @classmethod
    def of(cls, accelerator: Accelerator, *, patience: float = PATIENCE) -> "Team":
        """The team of an accelerator's processes, over a connection of its own to the group's store."""
        if accelerator.num_processes == 1:
            return cls(0, 1, None)
        store: Any = distributed.distributed_c10d._get_default_store()
        return cls(accelerator.process_index, accelerator.num_processes, store.clone(), patience=patience)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it this rank gives signs of life, and an error of one rank ends all of them, each of which says whose it was.

        A rank that waits in a collective cannot be woken: its watch ends the process with status `EXIT_PEER_FAILED`,
        after the failed rank has had the time to say why.
        """
        if self._store is None:
            yield
            return
        watch = threading.Thread(target=self._watch, args=(self._store.clone(),), name="team", daemon=True)
        watch.start()
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self._leaves.set()
            failed = self._report(error)
            if failed is not None:
                _say(failed)
                time.sleep(LAST_WORDS)
                raise SystemExit(EXIT_PEER_FAILED) from error
            raise
        finally:
            self._leaves.set()
            watch.join(2 * BEAT)

    def meet(self, what: str) -> None:
        """Wait until every rank is here; `what` names the place, the same for all of them.

        Raises `RuntimeError` for a rank that has given no sign of life for `patience` seconds, or that waits somewhere else.
        """
        if self._store is None:
            return
        self._meetings += 1
        self._store.set(_place(self.rank), _written(self._meetings, what))
        signs, pause, told = _Signs(self.patience), 0.002, time.monotonic() + TOLD
        while late := self._late(what):
            signs.look(self._store, late, what)
            if time.monotonic() > told:
                logger.warning("%s: waiting for %s", what, _ranks(late))
                told = time.monotonic() + 10 * TOLD
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def agree(self, what: str, facts: Mapping[str, str]) -> None:
        """Raise `ValueError` on every rank whose facts are not those of the first; every rank calls it.

        All ranks take part in each step: of other data or options than the rest, one would train something else, or wait for ever.
        """
        if self._store is None:
            return
        key = f"facts/{self._meetings}/{what}"
        if self.rank == 0:
            self._store.set(key, json.dumps(dict(facts)))
        self.meet(what)
        first = json.loads(self._store.get(key))
        names = [name for name in dict.fromkeys((*first, *facts)) if first.get(name) != facts.get(name)]
        if names:
            lines = (f"  {name}: {facts.get(name, 'absent')} here, {first.get(name, 'absent')} on rank 0" for name in names)
            raise ValueError("\n".join([f"{what}: rank {self.rank} on {socket.gethostname()} differs from rank 0:", *lines]))

    def blind_to(self, folder: Path) -> list[int]:
        """The ranks that do not see what the first writes into a folder, which exists: those of machines with another disk."""
        if self._store is None:
            return []
        mark = folder / f".hadron-{uuid4().hex}"
        if self.rank == 0:
            mark.touch()
            self._store.set(f"mark/{self._meetings}", mark.name)
        number = self._meetings
        self.meet(f"mark in {folder.name}")
        seen = (folder / self._store.get(f"mark/{number}").decode()).exists()
        self._store.set(f"seen/{number}/{self.rank}", "1" if seen else "0")
        self.meet(f"look into {folder.name}")
        if self.rank == 0:
            mark.unlink()
        return [rank for rank in range(self.world) if self._store.get(f"seen/{number}/{rank}") == b"0"]

    # The others

    def _late(self, what: str) -> list[int]:
        """The ranks that have not come to this meeting yet."""
        places = {rank: _read(self._store, _place(rank)) for rank in range(self.world) if rank != self.rank}
        late = []
        for rank, place in places.items():
            number, name = json.loads(place) if place else (0, "start")
            if number == self._meetings and name != what:
                raise RuntimeError(f"rank {rank} waits at '{name}', and rank {self.rank} at '{what}': they took different ways")
            if number < self._meetings:
                late.append(rank)
        return late

    def _report(self, error: BaseException) -> str | None:
        """Tell the others of an error of this rank, and let them hear it; what they said of their own, where that came first."""
        reason = f"rank {self.rank} on {socket.gethostname()} failed: {type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store went down with the rank that held it
            known = self._store.compare_set("failed", "", reason).decode()
            self._store.add("heard", 1)
            end = time.monotonic() + GRACE + 2 * BEAT
            while time.monotonic() < end and self._store.add("heard", 0) < self.world:
                time.sleep(0.05)
            return None if known == reason else known
        return None

    def _watch(self, store: Any) -> None:
        """Give signs of life until the rank leaves, and end this process where another one failed."""
        count = 0
        while not self._leaves.wait(BEAT):
            count += 1
            try:
                store.set(_beat(self.rank), str(count))
                failed = store.get("failed").decode() if store.check(["failed"]) else None
            except RuntimeError:
                failed = "the rank that held the processes' store is gone"
            if failed is not None and not self._leaves.wait(GRACE):
                with suppress(RuntimeError):
                    store.add("heard", 1)
                _say(failed)
                time.sleep(LAST_WORDS)
                os._exit(EXIT_PEER_FAILED)


class _Signs:
    """Since when the ranks that are waited for have given no sign of life."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._last: dict[int, tuple[str | None, float]] = {}

    def look(self, store: Any, ranks: Sequence[int], what: str) -> None:
        """Raise `RuntimeError` where one has been still for too long."""
        now = time.monotonic()
        for rank in ranks:
            beat = _read(store, _beat(rank))
            known, since = self._last.get(rank, (None, now))
            if rank not in self._last or beat != known:
                self._last[rank] = beat, now
            elif now - since > self.patience:
                raise RuntimeError(f"{what}: {_ranks([rank])} has given no sign of life for {now - since:.0f} seconds")


def _say(failed: str) -> None:
    logger.error("%s; this process ends too", failed)
    for handler in logging.getLogger("hadron").handlers:
        handler.flush()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _place(rank: int) -> str:
    return f"place/{rank}"


def _written(number: int, what: str) -> str:
    return json.dumps([number, what])


def _read(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
