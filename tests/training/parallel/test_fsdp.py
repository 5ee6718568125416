"""What FSDP2 cannot do is named, and gradients are averaged over what has them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small_family import SmallFamily
from torch import Tensor, nn

from library.training.parallel.choice import engine_of
from library.training.parallel.engine import Engine
from library.training.parallel.fsdp import ShardedEngine, average_gradients


def sharded() -> ShardedEngine:
    return ShardedEngine(cast(Any, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None))))


class Twice:
    """An accelerator whose other rank has the same tensors."""

    num_processes, device = 2, torch.device("cpu")

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        """The sum."""
        assert how == "sum"
        return 2 * tensor


def test_gradients_are_averaged_and_missing_ones_stay_missing() -> None:
    has, none, half = (nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    has.grad, half.grad = torch.arange(4.0).view(2, 2), torch.ones(2, dtype=torch.bfloat16)
    average_gradients([has, none, half], cast(Any, Twice()))
    assert has.grad.tolist() == [[0, 1], [2, 3]] and none.grad is None
    assert half.grad.dtype == torch.bfloat16 and half.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("version", "extra", "named"),
    [
        ("1", (), "FSDP"),
        ("2", ("--quantize_base", "nf4"), "--quantize_base nf4"),
        ("2", ("--compile",), "--compile"),
        ("2", ("--blocks_to_swap", "2"), "--blocks_to_swap 2"),
    ],
)
def test_what_fsdp_cannot_do_is_named(
    version: str, extra: tuple[str, ...], named: str, anima: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_VERSION", version)
    problems = list(sharded().refusals(anima.arch, anima.options(images, tmp_path, *extra)))
    assert [problem.split(":")[0] for problem in problems] == [named]


def test_one_process_is_never_shared_out(anima: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    alone = cast(Any, SimpleNamespace(num_processes=1))
    assert type(engine_of(alone, anima.options(images, tmp_path))) is Engine
