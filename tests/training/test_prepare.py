"""Before the first step: what the processes of a run must agree on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASKS = """
from pathlib import Path
from accelerate import PartialState
from library.training.prepare import resolved_seed

rank = PartialState(cpu=True).process_index
(Path(__file__).parent / f"seed-{rank}").write_text(str(resolved_seed(None)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's launcher is not reliable there")
def test_a_seed_that_nobody_gave_is_the_same_in_all_processes(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(ASKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "asks.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (int((tmp_path / f"seed-{rank}").read_text()) for rank in range(2))
    assert first == second
