"""Several processes on one cache: shared work, races, a kill in the middle."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from cache_samples import Vae, encoded_images, entries
from dataset_samples import one_subset
from hypothesis import given
from hypothesis import strategies as st

from library.core.tensor_file import load_tensors
from library.data.caches import fill_latents, rounds
from library.data.caches.rounds import each, in_turn, kept_behind, loaded_ahead

ROOT = Path(__file__).parent.parent.parent
WORK = """
import sys, time
from pathlib import Path
from cache_samples import Vae
from library.data.building import build_training_data
from library.data.caches import fill_latents
from library.data.options import DataOptions
file, seconds, rank, world = sys.argv[1], *map(float, sys.argv[2:])
vae = Vae()
def encode(pixels):
    time.sleep(seconds)
    return vae(pixels)
data = build_training_data(DataOptions(dataset_config=Path(file)), seed=0, resolution_step=32, default_resolution=64)
fill_latents(data, encode, identity="vae 1", to_disk=True, batch_size=1, shard=(int(rank), int(world)))
data.batch(0, 0)
print(vae.images)
"""


def worker(file: Path, seconds: float, rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    """A process of its own that fills the cache, `seconds` an image."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK, str(file), str(seconds), str(rank), str(world)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def divide(one: int, other: int) -> None:
    """Fails for nothing."""
    assert one // other >= 0


@given(st.integers(0, 30), st.integers(1, 5))
def test_every_process_goes_over_all_of_the_work_its_own_share_first(count, world):
    orders = [in_turn(range(count), (rank, world)) for rank in range(world)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    shares = Counter(chunk for rank, order in enumerate(orders) for chunk in order[: (rank + 1) * count // world - rank * count // world])
    assert all(shares[chunk] == 1 for chunk in range(count))


def test_images_are_loaded_ahead_in_order_and_not_all_at_once():
    loaded: list[int] = []
    seen = []
    for chunk in loaded_ahead([[n] for n in range(100)], lambda n: loaded.append(n) or n * n, lambda n: n % 10 != 3):
        assert len(loaded) <= len(seen) + 30
        seen += chunk.items
    assert seen == [(n, n * n) for n in range(100) if n % 10 != 3]


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_answers_stand_in_order_whether_threads_gave_them_or_not(monkeypatch, slow):
    monkeypatch.setattr(rounds, "SLOW", slow)
    seen = set()
    assert each(lambda n: seen.add(threading.get_ident()) or -n, range(500)) == [-n for n in range(500)]
    assert (len(seen) > 1) is (slow == 0.0)


def test_what_is_kept_behind_is_kept_at_the_end_and_its_errors_are_raised():
    kept: dict[int, int] = {}
    with kept_behind(kept.__setitem__) as keep:
        for n in range(50):
            keep(n, n)
    assert kept == {n: n for n in range(50)}
    with pytest.raises(ZeroDivisionError), kept_behind(divide) as keep:
        keep(1, 0)


def test_an_entry_that_another_process_wrote_meanwhile_is_not_encoded_again(make_folder, build):
    text = one_subset(make_folder(sizes=[(64, 64)] * 8))
    ours, theirs = Vae(), Vae()

    def encode(pixels):
        if ours.images == 0:  # the others are done while we encode our first image
            fill_latents(build(text), theirs, identity="x", to_disk=True, batch_size=1, shard=(1, 2))
        return ours(pixels)

    fill_latents(build(text), encode, identity="x", to_disk=True, batch_size=1, shard=(0, 2))
    assert (ours.images, theirs.images) == (1, 8)


def test_a_dead_process_leaves_its_share_to_the_others(make_folder, build):
    assert encoded_images(build(one_subset(make_folder())), shard=(1, 3)) == 4


def test_in_memory_every_process_encodes_all(make_folder, build):
    assert encoded_images(build(one_subset(make_folder())), to_disk=False, shard=(1, 2)) == 4


@pytest.mark.slow
def test_two_processes_share_the_work_on_one_folder(make_folder, build, tmp_path):
    folder = make_folder(sizes=[(64, 64)] * 24)
    data = build(one_subset(folder))
    workers = [worker(tmp_path / "data.toml", 0.15, rank, 2) for rank in range(2)]
    outputs = [process.communicate(timeout=300) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], outputs
    assert sum(int(said) for said, _ in outputs) <= 24 + 8  # 24 where both start at once; a late one finds more done
    assert encoded_images(data) == 0
    assert len(entries(folder, "latents")) == 24 and not list((folder / ".hadron_cache").glob("*.part"))


@pytest.mark.slow
def test_two_processes_that_know_nothing_of_each_other_leave_a_sound_cache(make_folder, build, tmp_path):
    folder = make_folder(sizes=[(64, 64)] * 12)
    data = build(one_subset(folder))
    workers = [worker(tmp_path / "data.toml", 0.0) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], outputs
    assert encoded_images(data) == 0
    assert all(load_tensors(entry)["latents"].shape == (3, 8, 8) for entry in entries(folder, "latents"))


@pytest.mark.slow
def test_after_a_kill_a_clean_run_finds_what_was_written_and_completes(make_folder, build, tmp_path):
    folder = make_folder(sizes=[(64, 64)] * 12)
    data = build(one_subset(folder))
    process = worker(tmp_path / "data.toml", 0.1)
    end = time.monotonic() + 120
    while len(entries(folder, "latents")) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    written = len(entries(folder, "latents"))
    assert 3 <= written < 12
    assert encoded_images(data) == 12 - written
    assert len(entries(folder, "latents")) == 12
