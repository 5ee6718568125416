"""Rates: from LoRA+ and patterns into every optimizer, and from the optimizer to the tracker."""

from typing import Any

import pytest
import torch
from optimizer_cases import CPU_OPTIMIZERS, options_of, trained
from torch import nn
from torch.optim import Optimizer

import networks
from library.training.optimizing.optimizer import build_optimizer, finds_rate, optimizer_class
from library.training.optimizing.rates import effective_rates
from library.training.optimizing.schedule import ScheduleOptions, build_schedule

FINDING = [name for name in CPU_OPTIMIZERS if finds_rate(optimizer_class(name))]
GIVEN = [name for name in CPU_OPTIMIZERS if name not in FINDING]
DTYPES = [torch.float32, torch.bfloat16]


def groups_of_a_network(rate: float, **arguments: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The groups of a LoRA on two layers, and their names, as a run takes them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    network = networks.create_network(model, "lora", rank=2, target_modules=["0", "1"], **arguments)
    return network.prepare_optimizer_params_with_multiple_te_lrs(None, None, rate)


def push(optimizer: Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    """Steps with a gradient of one everywhere."""
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GIVEN)
def test_every_optimizer_steps_a_group_by_its_own_rate(name: str, dtype: torch.dtype) -> None:
    slow, fast = (nn.Parameter(torch.zeros(32, 32, dtype=dtype)) for _ in range(2))
    optimizer = build_optimizer([{"params": [slow], "lr": 1e-3}, {"params": [fast], "lr": 3e-3}], options_of(name), seed=1)
    push(optimizer, [slow, fast], 10)
    assert (fast.float().mean() / slow.float().mean()).item() == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("name", GIVEN)
def test_lora_plus_and_patterns_reach_the_optimizer_and_the_tracker(name: str) -> None:
    groups, names = groups_of_a_network(1e-3, loraplus_lr_ratio=16, network_reg_lrs="1=5e-4")
    optimizer = build_optimizer(groups, options_of(name))
    build_schedule(optimizer, ScheduleOptions(), 10)
    push(optimizer, [parameter for group in groups for parameter in group["params"]], 1)
    expected = {"unet": 1e-3, "unet plus": 16e-3, "reg_lr_0": 5e-4, "reg_lr_0 plus": 16 * 5e-4}
    assert effective_rates(optimizer, names) == pytest.approx({f"lr/{name}": rate for name, rate in expected.items()})


@pytest.mark.parametrize("arguments", [{"loraplus_lr_ratio": 16}, {"network_reg_lrs": "1=0.5"}])
@pytest.mark.parametrize("name", FINDING)
def test_optimizers_that_find_one_rate_refuse_lora_plus_and_patterns(name: str, arguments: dict[str, Any]) -> None:
    groups, _ = groups_of_a_network(1.0, **arguments)
    with pytest.raises(ValueError, match=r"LoRA\+ or network_reg_lrs"):
        build_optimizer(groups, options_of(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FINDING)
def test_a_found_rate_is_told_beside_its_factor(name: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = trained(name, weight, steps=30, learning_rate=0.5)
    found = optimizer.param_groups[0]["d"]
    assert effective_rates(optimizer, ["unet"]) == {"lr/unet": 0.5, "lr/d*lr/unet": 0.5 * float(found)}
    assert found > 1e-6  # where all of them begin


def test_the_rate_is_that_of_the_step_just_taken() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([{"params": [weight]}], options_of("AdamW", learning_rate=1.0))
    schedule = build_schedule(optimizer, ScheduleOptions(lr_scheduler="linear"), 4)
    rates = []
    for _ in range(4):
        push(optimizer, [weight], 1)
        rates.append(effective_rates(optimizer, ["unet"])["lr/unet"])
        schedule.step()
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_a_schedule_free_optimizers_own_warm_up_shows() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([{"params": [weight]}], options_of("AdamWScheduleFree", optimizer_args=("warmup_steps=4",)))
    rates = []
    for _ in range(5):
        push(optimizer, [weight], 1)
        rates.append(effective_rates(optimizer, ["unet"])["lr/unet"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rate_that_adafactor_finds_is_told(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    arguments = ("relative_step=True", "scale_parameter=False")
    optimizer = build_optimizer([{"params": [weight]}], options_of("Adafactor", optimizer_args=arguments))
    push(optimizer, [weight], 1)
    assert effective_rates(optimizer, ["unet"]) == {"lr/unet": 1e-2}  # min(1e-2, 1 / sqrt(1))
