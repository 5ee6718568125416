"""The modules of the algorithms are there at once: what they need of heavy libraries they import when they need it."""

import subprocess
import sys

import pytest

HEAVY = ("diffusers", "transformers", "accelerate", "triton", "torch._dynamo", "sympy")
SCRIPT = "import sys, torch; before = set(sys.modules); import {}; print(*sorted(set(sys.modules) - before))"


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr"])
def test_an_algorithm_is_imported_without_heavy_libraries(module: str):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(module)], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert module in loaded and not [name for name in HEAVY if name in loaded]
