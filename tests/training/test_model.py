"""Base models and network as one module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from library.training.model import TrainingModel


class Base(nn.Linear):
    """A frozen layer with a buffer."""

    def __init__(self, device: str) -> None:
        super().__init__(3, 3, device=device)
        self.register_buffer("scale", torch.ones((), device=device))
        self.requires_grad_(False)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_sees_the_network_only_so_that_blocks_may_wait_on_another_device() -> None:
    parts: dict[str, Any] = {"denoiser": Base("meta"), "text_encoders": [Base("cpu")], "network": nn.Linear(2, 2)}
    model = DistributedDataParallel(TrainingModel(cast(Any, None), **parts, trains_text_encoders=True))
    left = {name for name, _ in (*model.module.named_parameters(), *model.module.named_buffers())} - model.parameters_to_ignore
    assert left == {"network.weight", "network.bias"}
