"""A run that is killed at any instant and resumed ends with the bytes of one that never was."""

import random
import sys
from pathlib import Path

import pytest

from benchmarks.kills import NETWORKS, Scene, chosen_instants, killed, reference


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_a_run_killed_at_any_instant_and_resumed_leaves_equal_bytes(family: str, tmp_path: Path) -> None:
    scene, generator = Scene(family, tmp_path / "scene"), random.Random(8)
    whole, watched = reference(scene)
    instants = watched.instants
    assert {"net.safetensors", "net_ema.safetensors", "log.jsonl"} <= whole.keys() and any(name.endswith(".png") for name in whole)
    late = [number for number in chosen_instants(instants, len(instants), generator) if number > len(instants) // 2]
    kills = [killed(scene, whole, number=late[0]), killed(scene, whole, seconds=generator.uniform(0.6, 0.9) * watched.seconds)]
    assert all(kill.differing == () for kill in kills), kills
    assert kills[0].resumed_from, "an instant in the second half comes after the first state"
