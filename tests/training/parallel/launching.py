"""Two processes on this machine, as a user's launcher starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def two(*arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments in two processes that find the project and the helpers of its tests."""
    paths = (ROOT, ROOT / "tests", HERE.parent, HERE)
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | own | variables
    return subprocess.run([sys.executable, *LAUNCH, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
