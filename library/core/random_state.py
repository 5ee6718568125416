"""The global generators of torch, Python and NumPy, put back as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Within it anything may draw; afterwards all global generators (torch's on the CPU and on `device`, too) are where they were.

    Our own code draws from generators of its own; a third-party network may not.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type != "cuda" else [torch.cuda.current_device() if device.index is None else device.index]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
