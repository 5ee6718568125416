"""The processes of a run wait for each other and hear of each other's failures."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from launching import two
from torch import distributed

from library.training.parallel.team import EXIT_PEER_FAILED, Team


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> tuple[Team, Team]:
    """Two ranks in one process, over one store."""
    store: Any = distributed.HashStore()
    store.set_timeout(timedelta(seconds=5))
    made = []
    for rank in range(2):
        monkeypatch.setattr(Team, "_made", 0)
        made.append(Team(rank, 2, store, patience=1.0))
    return made[0], made[1]


def both(first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
    """What two calls at the same time give: a result or the error."""

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ValueError, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(attempt, (first, second)))


def test_one_process_waits_for_nobody() -> None:
    team = Team(0, 1, None)
    with team.together():
        team.meet("here")
        team.agree("the data", {"images": "3"})
    assert team.blind_to(Path("nowhere")) == []


def test_a_rank_waits_until_the_other_has_come(teams: tuple[Team, Team]) -> None:
    order: list[str] = []

    def late() -> None:
        time.sleep(0.1)
        order.append("late")
        teams[1].meet("caches")

    def early() -> None:
        teams[0].meet("caches")
        order.append("early")

    assert both(early, late) == [None, None]
    assert order == ["late", "early"]


def test_a_rank_without_a_sign_of_life_is_not_waited_for_for_ever(teams: tuple[Team, Team]) -> None:
    with pytest.raises(RuntimeError, match="caches: rank 1 has given no sign of life"):
        teams[0].meet("caches")


def test_a_slow_rank_that_gives_signs_is_waited_for_beyond_the_patience(teams: tuple[Team, Team]) -> None:
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.05):
            count += 1
            teams[1]._store.set("beat/1", str(count))

    beats = threading.Thread(target=beat)
    beats.start()

    def slow() -> None:
        time.sleep(2.5)
        teams[1].meet("caches")

    found = both(lambda: teams[0].meet("caches"), slow)
    stop.set()
    beats.join()
    assert found == [None, None]


def test_ranks_that_wait_at_different_places_say_so(teams: tuple[Team, Team]) -> None:
    first, second = both(lambda: teams[0].meet("saving"), lambda: teams[1].meet("caches"))
    assert "they took different ways" in str(first) or "they took different ways" in str(second)


def test_what_differs_from_the_first_rank_is_named(teams: tuple[Team, Team]) -> None:
    one = {"--seed": "1", "images": "10"}
    first, second = both(lambda: teams[0].agree("options", one), lambda: teams[1].agree("options", one | {"images": "9"}))
    assert first is None
    assert isinstance(second, ValueError) and "images: 9 here, 10 on rank 0" in str(second) and "--seed" not in str(second)


def test_a_shared_folder_is_seen_by_all_and_left_as_it_was(teams: tuple[Team, Team], tmp_path: Path) -> None:
    assert both(lambda: teams[0].blind_to(tmp_path), lambda: teams[1].blind_to(tmp_path)) == [[], []]
    assert list(tmp_path.iterdir()) == []


def test_a_rank_with_another_disk_is_named(teams: tuple[Team, Team], tmp_path: Path) -> None:
    mine, other = tmp_path / "mine" / "out", tmp_path / "other" / "out"
    mine.mkdir(parents=True)
    other.mkdir(parents=True)
    assert both(lambda: teams[0].blind_to(mine), lambda: teams[1].blind_to(other)) == [[1], [1]]


FAILS = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from library.core.command_line import run_script
from library.core.log import set_up_logging
from library.training.parallel.team import Team

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
set_up_logging()
team = Team.of(accelerator)
ended = Path(sys.argv[1]) / f"rank-{accelerator.process_index}"
signal.signal(signal.SIGTERM, lambda *_: None)  # the launcher's, once rank 1 is gone: like a run, which notes it for the end of the step
leave = os._exit
os._exit = lambda status: (ended.write_text(str(status)), leave(status))

def main(argv):
    with team.together():
        if accelerator.process_index == 1:
            raise ValueError("the disk of this machine is full")
        while True:  # at work, in nothing that could be interrupted
            time.sleep(0.1)

try:
    run_script(main)
except SystemExit as end:
    ended.write_text(str(end.code))
    raise
"""

SLOW = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from library.training.parallel.team import Team

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=8))])
team = Team.of(accelerator, patience=4)
with team.together():
    time.sleep(12 * accelerator.process_index)  # its share of a cache
    team.meet("caches")
    total = accelerator.reduce(torch.ones(()), "sum")
(Path(sys.argv[1]) / f"rank-{accelerator.process_index}").write_text(str(float(total)))
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_each_says_why(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    done = two(str(tmp_path / "fails.py"), str(tmp_path))
    assert done.returncode != 0
    assert "error: the disk of this machine is full" in done.stderr
    assert "rank 1 on" in done.stderr and "failed: ValueError: the disk of this machine is full; this process ends too" in done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == [str(EXIT_PEER_FAILED), "2"]


@pytest.mark.slow
def test_a_slow_rank_outlasts_the_timeout_of_collectives(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    done = two(str(tmp_path / "slow.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["2.0", "2.0"]
