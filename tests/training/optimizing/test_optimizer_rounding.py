"""Weights in bfloat16: small steps are not lost, and nothing but the rounding differs from float32."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from optimizer_cases import CPU_OPTIMIZERS, descend, options_of, trained
from torch import nn

from library.training.optimizing.averaging import innermost
from library.training.optimizing.optimizer import build_optimizer
from library.training.optimizing.rounding import StochasticRounding, rounded_stochastically
from library.training.optimizing.schedule import ScheduleOptions, build_schedule

EXACT = ("AdamW", "Lion", "SGDNesterov", "Prodigy", "AdamWScheduleFree", "Adafactor", "DAdaptAdam", "AdamW8bit")


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(seed: int = 0, *, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.randn(64, 64, generator=noise(seed)).to(dtype))


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, 0.99999, -123.4])
def test_the_mean_of_the_rounded_is_the_value(value: float) -> None:
    rounded = rounded_stochastically(torch.full((200_000,), value), noise()).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert low < value < high  # two neighbours
    share = (value - low) / (high - low)
    deviation = (high - low) * (share * (1 - share) / len(rounded)) ** 0.5
    assert abs(rounded.mean().item() - value) < 5 * deviation


@given(st.floats(width=32, allow_subnormal=False, min_value=-(2.0**100), max_value=2.0**100), st.integers(0, 99))
def test_a_value_becomes_one_of_its_two_neighbours(value: float, seed: int) -> None:
    exact = torch.tensor([value])
    rounded = rounded_stochastically(exact, noise(seed)).float()
    towards_zero = (exact.view(torch.int32) & -65536).view(torch.float32)
    away = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert rounded.item() in (towards_zero.item(), away.item())


def test_what_bfloat16_has_is_kept() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -(2.0**-120), float("inf"), -float("inf"), float("nan")])
    rounded = rounded_stochastically(values, noise()).float()
    assert torch.equal(rounded.nan_to_num(7), values.nan_to_num(7)) and rounded[1].signbit()


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    """500 steps of 2e-4, where bfloat16 knows nothing between 0.996 and 1."""
    parameter, plain = (nn.Parameter(torch.ones(40_000, dtype=torch.bfloat16)) for _ in range(2))
    ours = build_optimizer([{"params": [parameter]}], options_of("torch.optim.SGD", learning_rate=2e-4), seed=1)
    naive = torch.optim.SGD([plain], lr=2e-4)
    for _ in range(500):
        for optimizer, moved in ((ours, parameter), (naive, plain)):
            moved.grad = torch.ones_like(moved)
            optimizer.step()
    assert plain.float().mean().item() == 1 and parameter.float().mean().item() == pytest.approx(0.9, abs=5e-4)


@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
def test_every_optimizer_comes_where_float32_comes(name: str) -> None:
    weights = {dtype: weight(dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    for parameter in weights.values():
        trained(name, parameter, steps=60)
    short, full = (parameter.detach().float().square().mean().item() for parameter in weights.values())
    assert short == pytest.approx(full, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("name", EXACT)
def test_a_run_that_goes_on_from_its_state_repeats_the_run(name: str) -> None:
    straight, resumed = weight(), weight()
    trained(name, straight, steps=6)
    state = trained(name, resumed, steps=3).state_dict()
    again = build_optimizer([{"params": [resumed]}], options_of(name), seed=3)
    again.load_state_dict(state)
    descend(again, resumed, steps=3)
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize("name", EXACT)
def test_states_are_float32_and_stay_so_when_loaded(name: str) -> None:
    parameter = weight()
    optimizer = trained(name, parameter, steps=2)
    optimizer.load_state_dict(optimizer.state_dict())
    kinds = {tensor.dtype for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)}
    assert torch.bfloat16 not in kinds and kinds


def test_the_copies_live_no_longer_than_a_step() -> None:
    parameter = weight()
    optimizer = trained("AdamW", parameter, steps=1)
    (stand_in,) = optimizer.param_groups[0]["params"]
    assert stand_in.numel() == 0 and stand_in.grad is None and parameter.grad is None and parameter.dtype == torch.bfloat16


def test_float32_parameters_beside_bfloat16_ones_are_stepped_as_ever() -> None:
    beside, alone = weight(1, dtype=torch.float32), weight(1, dtype=torch.float32)
    trained("AdamW", weight(), beside, steps=5)
    trained("AdamW", alone, steps=5)
    assert torch.equal(beside, alone)


def test_a_network_in_float32_is_not_wrapped() -> None:
    assert type(trained("AdamW", weight(dtype=torch.float32), steps=1)) is torch.optim.AdamW


def test_other_seeds_round_otherwise() -> None:
    weights = [weight(), weight()]
    for seed, parameter in enumerate(weights):
        descend(build_optimizer([{"params": [parameter]}], options_of("AdamW"), seed=seed), parameter, steps=3)
    assert not torch.equal(*weights)


def test_the_schedule_reaches_the_optimizer_within() -> None:
    parameter = weight()
    optimizer = build_optimizer([{"params": [parameter]}], options_of("AdamW"))
    schedule = build_schedule(optimizer, ScheduleOptions(lr_scheduler="linear"), 4)
    descend(optimizer, parameter, steps=1)
    schedule.step()
    assert innermost(optimizer).param_groups[0]["lr"] == pytest.approx(0.75e-2)


class Rebinding(torch.optim.SGD):
    """An optimizer that gives its parameters new tensors."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - group["lr"]


def test_an_optimizer_that_does_not_work_in_place_is_rounded_too() -> None:
    parameter = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = StochasticRounding(lambda groups: Rebinding(groups, lr=1e-3), [{"params": [parameter]}], seed=0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.float().mean().item() == pytest.approx(1 - 1e-3, abs=1e-4)


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="without a closure"):
        trained("AdamW", weight(), steps=1).step(lambda: 0.0)


def test_accelerate_prepares_it_and_changes_nothing() -> None:
    plain, prepared = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.bfloat16)
    prepared.load_state_dict(plain.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    optimizers: list[Any] = [build_optimizer([{"params": [*model.parameters()]}], options_of("AdamW")) for model in (plain, prepared)]
    optimizers[1] = accelerator.prepare(prepared, optimizers[1])[1]
    for model, optimizer in zip((plain, prepared), optimizers, strict=True):
        for _ in range(3):
            model(torch.ones(2, 8, dtype=torch.bfloat16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(first, second) for first, second in zip(plain.parameters(), prepared.parameters(), strict=True))
    assert isinstance(optimizers[1].optimizer, StochasticRounding) and type(innermost(optimizers[1])) is torch.optim.AdamW
