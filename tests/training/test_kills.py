"""A run that is killed at a random instant and resumed ends with the bytes of one that never was; `benchmarks.kills` tries many."""

import random
import sys
from pathlib import Path

import pytest

from benchmarks.kills import NETWORKS, Scene, killed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_a_run_killed_at_a_random_instant_and_resumed_leaves_equal_bytes(family: str, tmp_path: Path) -> None:
    scene, generator = Scene(family, tmp_path / "scene"), random.Random(f"kills {family}")
    scene.reset()
    instants, whole = scene.watched().instants, scene.outcome()
    assert {"net.safetensors", "net_ema.safetensors", "log.jsonl"} <= whole.keys() and any(name.endswith(".png") for name in whole)
    kill = killed(scene, whole, number=generator.randrange(len(instants) // 2, len(instants)))
    assert kill.differing == (), kill
