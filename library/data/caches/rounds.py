"""The work of filling a cache: who encodes what and when, with images decoded ahead, and what the log says of it."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.core.keyed_random import keyed_random
from library.core.log import ROOT_LOGGER, get_logger

logger = get_logger(__name__)
THREADS = min(8, os.cpu_count() or 1)  # that decode images
LOOKERS, FIRST, SLOW = 16, 64, 0.0005  # threads that look at files; after so many answers that took so many seconds each
WRITERS = 4  # threads that write entries: they wait for the disk
Item = TypeVar("Item")
Content = TypeVar("Content")
Shard = tuple[int, int]
"""The number of this process, and how many fill the cache together."""


def in_turn(chunks: Sequence[Item], shard: Shard) -> list[Item]:
    """All chunks, this process's own share first; the others' shares follow in an order of its own.

    Whoever is done early thus takes work off the others without asking them: each looks before it encodes whether an entry is there
    by now. A process that died leaves its share to the rest.
    """
    rank, world = shard
    start, stop = rank * len(chunks) // world, (rank + 1) * len(chunks) // world
    others = [*chunks[:start], *chunks[stop:]]
    keyed_random(rank, "cache").shuffle(others)
    return [*chunks[start:stop], *others]


@dataclass(frozen=True)
class Loaded(Generic[Item, Content]):
    """A chunk when its turn comes: how many items it had, and those still wanted with what was loaded for them."""

    asked: int
    items: list[tuple[Item, Content]]


def loaded_ahead(
    chunks: Iterable[list[Item]], load: Callable[[Item], Content], wanted: Callable[[Item], bool]
) -> Iterator[Loaded[Item, Content]]:
    """Each chunk with what `load` makes of its items, made by threads while the chunks before are at work.

    Items that are not `wanted` are not loaded. About two items a thread are held at a time, and never less than a chunk.
    """
    waiting: deque[tuple[int, list[tuple[Item, Future[Content]]]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for chunk in chunks:
                waiting.append((len(chunk), [(item, pool.submit(load, item)) for item in chunk if wanted(item)]))
                while len(waiting) > 1 and sum(len(items) for _, items in waiting) > 2 * THREADS:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            for _, items in waiting:
                for _, future in items:
                    future.cancel()


def each(look: Callable[[Item], Content], items: Iterable[Item]) -> list[Content]:
    """What `look` says of each item, in order: by threads where the first answers are slow, as from files in a network.

    Files of this machine answer so fast that threads would only stand in each other's way.
    """
    waiting = iter(items)
    start = time.perf_counter()
    found = [look(item) for item in islice(waiting, FIRST)]
    if time.perf_counter() - start < FIRST * SLOW:
        return [*found, *map(look, waiting)]
    with ThreadPoolExecutor(LOOKERS) as pool:
        return [*found, *pool.map(look, waiting)]


@contextmanager
def kept_behind(keep: Callable[[Item, Content], None]) -> Iterator[Callable[[Item, Content], None]]:
    """A function that has threads call `keep`, so that the models need not wait for the disk; about two calls a thread wait.

    An error of `keep` is raised by a later call, or at the end.
    """
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:

        def later(item: Item, content: Content) -> None:
            while len(waiting) >= 2 * WRITERS:
                waiting.popleft().result()
            waiting.append(pool.submit(keep, item, content))

        yield later
        for future in waiting:
            future.result()


@contextmanager
def told(what: str, count: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over `count` items of `what`, and a line in the log at the end; yields a function (items done, of them encoded)."""
    start, encoded = time.perf_counter(), 0
    with logging_redirect_tqdm([ROOT_LOGGER]), tqdm(total=count, desc=what, disable=not (shown and count), smoothing=0.05) as bar:

        def done(items: int, own: int) -> None:
            nonlocal encoded
            encoded += own
            bar.update(items)

        yield done
    if encoded:
        seconds = time.perf_counter() - start
        logger.info("%s: %d encoded in %.1f s, %.1f a second", what, encoded, seconds, encoded / max(seconds, 1e-6))


def _finished(asked: int, items: list[tuple[Item, Future[Content]]]) -> Loaded[Item, Content]:
    return Loaded(asked, [(item, future.result()) for item, future in items])
