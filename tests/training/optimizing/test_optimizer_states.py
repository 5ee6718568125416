"""Every optimizer and every schedule goes on from a state with the very same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import CPU_OPTIMIZERS, descend, options_of
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from library.core.tensor_tree import packed, read_tensors, unpacked, write_tensors
from library.training.optimizing.fused_backward import fuse_backward
from library.training.optimizing.optimizer import build_optimizer, small_optimizer
from library.training.optimizing.rounding import StochasticRounding
from library.training.optimizing.schedule import SHAPES, ScheduleOptions, build_schedule
from library.training.state.content import load_exactly

STEPS = 4
SHAPED = {"lr_scheduler_num_cycles": 2, "lr_warmup_steps": 2, "lr_scheduler_min_lr_ratio": 0.1, "lr_decay_steps": 2}
CLASSES = {
    "MultiStepLR": ("milestones=2,5", "gamma=0.5"), "StepLR": ("step_size=3",), "CosineAnnealingLR": ("T_max=7",),
    "CosineAnnealingWarmRestarts": ("T_0=3",), "OneCycleLR": ("max_lr=0.1", "total_steps=20"), "ExponentialLR": ("gamma=0.9",),
    "LinearLR": (), "ConstantLR": (), "PolynomialLR": (), "CyclicLR": ("base_lr=0.001", "max_lr=0.1", "cycle_momentum=False"),
}  # fmt: skip


def weights(dtype: torch.dtype, large: bool = False) -> list[nn.Parameter]:
    """Three weights; a large one is beyond what 8-bit optimizers keep in 32 bits."""
    torch.manual_seed(0)
    shapes = [(4, 6), (3, 2, 2, 2), (64, 80) if large else (5, 3)]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def through_files(state: Any, folder: Path) -> Any:
    text, tensors = packed(state, "optimizer")
    path = folder / "optimizer.safetensors"
    if tensors:
        write_tensors(path, tensors)
    return unpacked(json.loads(json.dumps(text)), read_tensors(path) if tensors else {})


def halves(name: str, folder: Path, own: list[nn.Parameter], **others: Any) -> tuple[Optimizer, Optimizer, list[nn.Parameter]]:
    """An optimizer after some steps, and another one that goes on from its state with copies of its weights."""
    options = options_of(name, **others)
    first = build_optimizer([{"params": own[:2]}, {"params": own[2:]}], options, seed=3)
    descend(first, *own, steps=STEPS)
    copies = [nn.Parameter(weight.detach().clone()) for weight in own]
    second = build_optimizer([{"params": copies[:2]}, {"params": copies[2:]}], options, seed=3)
    load_exactly(second, through_files(first.state_dict(), folder), second.load_state_dict)
    return first, second, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    own = weights(dtype, large="8bit" in name)
    first, second, copies = halves(name, tmp_path, own)
    assert type(first) is type(second) and (dtype is torch.float32 or isinstance(first, StochasticRounding))
    for optimizer, members in ((first, own), (second, copies)):
        descend(optimizer, *members, steps=STEPS)
    assert all(torch.equal(one, other) for one, other in zip(own, copies, strict=True))


@pytest.mark.parametrize("name", sorted(kind for kind in vars(torch.optim) if isinstance(vars(torch.optim)[kind], type)))
def test_the_optimizers_of_torch_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    if name in ("Optimizer", "LBFGS", "SparseAdam"):
        pytest.skip("not for training here")
    try:
        small_optimizer(options_of(name))
    except ValueError as error:
        pytest.skip(str(error))
    own = [nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]  # Muon takes matrices only
    first, second, copies = halves(name, tmp_path, own)
    for optimizer, members in ((first, own), (second, copies)):
        descend(optimizer, *members, steps=STEPS)
    assert all(torch.equal(one, other) for one, other in zip(own, copies, strict=True))


def test_a_fused_backward_pass_goes_on_bit_for_bit(tmp_path: Path) -> None:
    own = weights(torch.bfloat16)
    options = options_of("AdamW")
    first = build_optimizer([{"params": own}], options, seed=3)
    fuse_backward(first, 0.0)
    _fall(own)
    copies = [nn.Parameter(weight.detach().clone()) for weight in own]
    second = build_optimizer([{"params": copies}], options, seed=3)
    load_exactly(second, through_files(first.state_dict(), tmp_path), second.load_state_dict)
    fuse_backward(second, 0.0)
    _fall(own)
    _fall(copies)
    assert all(torch.equal(one, other) for one, other in zip(own, copies, strict=True))


def _fall(members: list[nn.Parameter]) -> None:
    for _ in range(STEPS):
        torch.stack([weight.float().square().mean() for weight in members]).sum().backward()


def test_states_of_another_dtype_than_their_weights_are_not_cast() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    kept = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    load_exactly(
        optimizer, {"state": {0: {"wide": kept}}, "param_groups": optimizer.state_dict()["param_groups"]}, optimizer.load_state_dict
    )
    assert optimizer.state[weight]["wide"].dtype == torch.float64 and torch.equal(optimizer.state[weight]["wide"], kept)


def test_a_state_of_another_optimizer_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    state = torch.optim.SGD([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))], lr=0.1).state_dict()
    with pytest.raises(ValueError, match="another optimizer or of other weights"):
        load_exactly(optimizer, state, optimizer.load_state_dict)


def schedules() -> dict[str, ScheduleOptions]:
    found = {}
    for name, shape in SHAPES.items():
        given = {option: SHAPED.get(option, 1.0) for option in shape.options if option in SHAPED}
        arguments = ("step_rules=1:5,0.1:10,0.01",) if name == "piecewise_constant" else ()
        found[name] = ScheduleOptions(lr_scheduler=name, lr_scheduler_args=arguments, **given)
    named = {name: ScheduleOptions(lr_scheduler_type=name, lr_scheduler_args=arguments) for name, arguments in CLASSES.items()}
    return found | named


@pytest.mark.parametrize("name", schedules())
def test_a_schedule_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = schedules()[name]
    adafactor = {"optimizer_type": "Adafactor", "optimizer_args": ("relative_step=True",)}
    chosen = options_of("AdamW") if name != "adafactor" else options_of("Adafactor", **adafactor)
    rates: list[list[float]] = []
    own = weights(torch.float32)
    optimizer = build_optimizer([{"params": own}], chosen)
    schedule = build_schedule(optimizer, options, 20)
    _made_steps(own, optimizer, schedule, 8)
    copies = [nn.Parameter(weight.detach().clone()) for weight in own]
    again = build_optimizer([{"params": copies}], chosen)
    resumed = build_schedule(again, options, 20)
    load_exactly(again, through_files(optimizer.state_dict(), tmp_path), again.load_state_dict)
    resumed.load_state_dict(through_files(schedule.state_dict(), tmp_path))
    rates = [_made_steps(own, optimizer, schedule, 8), _made_steps(copies, again, resumed, 8)]
    assert rates[0] == rates[1] and all(torch.equal(one, other) for one, other in zip(own, copies, strict=True))


def _made_steps(members: list[nn.Parameter], optimizer: Optimizer, schedule: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        descend(optimizer, *members, steps=1)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates
