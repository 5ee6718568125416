"""What blocks keep for the backward pass, counted on fakes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.training.memory.activations import fakes, saved_bytes

WIDTH, ROWS = 8, 4
FLOAT, HALF = 4, 2


class Block(nn.Module):
    """A frozen block whose bytes can be counted by hand: the square keeps its input, the Linear keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) -> (rows, width)."""
        return x + self.layer(x).square()


@pytest.fixture
def row() -> nn.Sequential:
    """Three blocks."""
    return nn.Sequential(Block(), Block(), Block())


def given() -> Tensor:
    return torch.zeros(ROWS, WIDTH).requires_grad_()


def test_a_block_keeps_what_can_be_counted_by_hand(row: nn.Sequential) -> None:
    with fakes():
        found = saved_bytes(row, list(row), lambda: row(given()))
    assert [(each.kept, each.given) for each in found] == [(ROWS * WIDTH * FLOAT, ROWS * WIDTH * FLOAT)] * 3


def test_operations_are_two_for_each_product(row: nn.Sequential) -> None:
    with fakes():
        found = saved_bytes(row, list(row), lambda: row(given()))
    assert [each.operations for each in found] == [2 * ROWS * WIDTH * WIDTH] * 3


def test_autocast_keeps_its_casts_of_frozen_weights(row: nn.Sequential) -> None:
    with fakes(precision=torch.bfloat16):
        found = saved_bytes(row, list(row), lambda: row(given()))
    weight, square = WIDTH * WIDTH * HALF, ROWS * WIDTH * HALF
    assert [each.kept for each in found] == [weight + square] * 3


def test_real_weights_stay_as_they_are(row: nn.Sequential) -> None:
    before = {name: tensor.clone() for name, tensor in row.state_dict().items()}
    with fakes(precision=torch.bfloat16):
        saved_bytes(row, list(row), lambda: row(given()))
    after = row.state_dict()
    assert all(type(tensor) is Tensor and torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_fakes_within_fakes_go_on() -> None:
    with fakes():
        x = torch.zeros(2)
        with fakes(precision=torch.bfloat16):
            y = x + torch.zeros(2)
    assert y.shape == (2,)


@pytest.mark.parametrize(("as_on_gpu", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_norms_are_wide_as_on_a_gpu(as_on_gpu: bool, dtype: torch.dtype) -> None:
    with fakes(precision=torch.bfloat16, as_on_gpu=as_on_gpu):
        normed = functional.layer_norm(torch.zeros(2, 4, dtype=torch.bfloat16), (4,))
    assert normed.dtype is dtype


def test_torchs_functions_are_put_back() -> None:
    own = functional.layer_norm
    with pytest.raises(RuntimeError, match="by purpose"), fakes():
        raise RuntimeError("by purpose")
    assert functional.layer_norm is own
