"""Schedule-free optimizers: the averaged weights are there for saving, and gone for training."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from optimizer_cases import CPU_OPTIMIZERS, descend, trained
from torch import nn

from library.training.optimizing.averaging import averaged, innermost, is_schedule_free
from library.training.optimizing.optimizer import optimizer_class

SCHEDULE_FREE = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"]


def weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_the_schedule_free_ones_are_known_by_their_two_modes() -> None:
    assert [name for name in CPU_OPTIMIZERS if is_schedule_free(optimizer_class(name))] == SCHEDULE_FREE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_within_are_the_averaged_weights_and_afterwards_the_trained_ones(name: str, dtype: torch.dtype) -> None:
    parameter = weight(dtype)
    optimizer = trained(name, parameter, steps=20)
    y = parameter.detach().clone()
    (state,) = optimizer.state.values()
    group = innermost(optimizer).param_groups[0]
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    x = (y.float() - (1 - beta) * state["z"]) / beta  # y = (1 - beta) z + beta x
    with averaged(optimizer):
        torch.testing.assert_close(parameter.detach(), x.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert not torch.equal(parameter, y)
    assert torch.equal(parameter, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_looking_at_them_changes_no_later_step(name: str, dtype: torch.dtype) -> None:
    plain, looked = weight(dtype), weight(dtype)
    trained(name, plain, steps=20)
    optimizer = trained(name, looked, steps=10)
    with averaged(optimizer):
        pass
    descend(optimizer, looked, steps=10)
    assert torch.equal(plain, looked)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_before_the_first_step_they_are_the_weights(name: str) -> None:
    parameter = weight()
    with averaged(trained(name, parameter, steps=0)):
        assert torch.equal(parameter, weight())


def test_an_error_within_brings_the_trained_weights_back() -> None:
    parameter = weight()
    optimizer = trained("AdamWScheduleFree", parameter, steps=5)
    y = parameter.detach().clone()
    with pytest.raises(KeyError), averaged(optimizer):
        raise KeyError
    assert torch.equal(parameter, y) and innermost(optimizer).param_groups[0]["train_mode"]


def test_other_optimizers_keep_their_weights() -> None:
    parameter = weight()
    optimizer = trained("AdamW", parameter, steps=5)
    y = parameter.detach().clone()
    with averaged(optimizer):
        assert torch.equal(parameter, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_works_through_accelerates_wrapper(dtype: torch.dtype) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    parameter = weight(dtype)
    optimizer = Accelerator(cpu=True).prepare(trained("AdamWScheduleFree", parameter, steps=5))
    y = parameter.detach().clone()
    with averaged(optimizer):
        assert not torch.equal(parameter, y)
    assert torch.equal(parameter, y)
