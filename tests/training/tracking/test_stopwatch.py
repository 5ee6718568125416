"""Seconds and images of a step."""

from collections.abc import Iterator

import torch

from library.training.tracking.speed import Stopwatch, memory_figures


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def slow(clock: Clock, *waits: float) -> Iterator[int]:
    for number, seconds in enumerate(waits):
        clock.now += seconds
        yield number


def test_a_step_lasts_from_asking_for_its_batch_to_its_end() -> None:
    clock = Clock()
    watch = Stopwatch(1, clock)
    batches = watch.timed(slow(clock, 2.0, 0.5))
    next(batches)
    watch.count(6)
    clock.now += 1.0
    assert watch.stop() == {
        "speed/step_seconds": 3.0, "speed/data_seconds": 2.0, "speed/images_per_second": 2.0, "speed/images_seen": 6.0,
    }  # fmt: skip


def test_what_is_done_between_steps_does_not_count() -> None:
    clock = Clock()
    watch = Stopwatch(1, clock)
    batches = watch.timed(slow(clock, 0.0, 0.5))
    next(batches)
    watch.stop()
    clock.now += 60.0  # saving
    next(batches)
    clock.now += 1.0
    assert watch.stop()["speed/step_seconds"] == 1.5


def test_all_batches_of_a_step_count_together() -> None:
    clock = Clock()
    watch = Stopwatch(1, clock)
    for _ in watch.timed(slow(clock, 1.0, 2.0)):
        watch.count(2)
        clock.now += 0.5
        figures = watch.stop() if watch._images == 4 else {}
    assert (figures["speed/data_seconds"], figures["speed/step_seconds"]) == (3.0, 4.0)


def test_images_of_all_processes_count() -> None:
    watch = Stopwatch(4, Clock())
    watch.count(2)
    assert watch.stop()["speed/images_seen"] == 8


def test_the_end_of_an_epoch_is_no_step() -> None:
    clock = Clock()
    watch = Stopwatch(1, clock)
    list(watch.timed(slow(clock)))
    clock.now += 60.0
    batches = watch.timed(slow(clock, 1.0))
    next(batches)
    assert watch.stop()["speed/step_seconds"] == 1.0


def test_memory_of_the_process_is_known_and_its_peak_is_no_less() -> None:
    figures = memory_figures(torch.device("cpu"))
    if "memory/process" in figures:
        assert 0 < figures["memory/process"] <= figures["memory/process_peak"] * 1.01
