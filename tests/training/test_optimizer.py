"""Optimizers and schedules are found by name, checked, and follow their papers."""

import pytest
import torch

from library.core.options import OptionError
from library.training.lion import Lion
from library.training.optimizer import OPTIMIZERS, OptimizerOptions, build_optimizer, optimizer_arguments, optimizer_class
from library.training.schedule import ScheduleOptions, build_schedule, warmup_steps

CPU_OPTIMIZERS = [name for name in OPTIMIZERS if not name.startswith("Paged")]


def problems(options: OptimizerOptions | ScheduleOptions) -> str:
    return "\n".join(options.check())


@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
def test_every_named_optimizer_lowers_a_quadratic(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = build_optimizer([{"params": [weight], "lr": 1e-2}], OptimizerOptions(optimizer_type=name.lower(), learning_rate=1e-2))
    before = weight.square().mean().item()
    for _ in range(20):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.square().mean().item() < 0.9 * before


def test_what_a_constructor_refuses_is_said_with_its_arguments() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-3}
    with pytest.raises(ValueError, match="AdamW with differentiable=True, fused=True.*does not support"):
        build_optimizer([group], OptimizerOptions(optimizer_args=("differentiable=True",)))


def test_a_dotted_path_is_taken() -> None:
    assert optimizer_class("torch.optim.RAdam") is torch.optim.RAdam


@pytest.mark.parametrize(("name", "message"), [
    ("AdmW", "did you mean 'AdamW'"), ("torch.optim.Nope", "cannot import"), ("no.such", "cannot import"),
    ("torch.nn.Linear", "is not a torch Optimizer"),
])  # fmt: skip
def test_an_unknown_optimizer_is_refused(name: str, message: str) -> None:
    assert message in problems(OptimizerOptions(optimizer_type=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device can page")
def test_a_paged_optimizer_without_cuda_says_what_to_use() -> None:
    assert "need a CUDA device; use AdamW8bit" in problems(OptimizerOptions(optimizer_type="PagedAdamW8bit"))


def test_arguments_are_checked_against_the_constructor() -> None:
    assert optimizer_arguments(torch.optim.AdamW, ["betas=0.9,0.99", "weight_decay=1e-2", "amsgrad=True"]) == {
        "betas": (0.9, 0.99), "weight_decay": 0.01, "amsgrad": True,
    }  # fmt: skip
    with pytest.raises(OptionError) as caught:
        optimizer_arguments(torch.optim.AdamW, ["wieght_decay=1", "lr=1"])
    assert "did you mean 'weight_decay'" in caught.value.problems[0] and "--learning_rate" in caught.value.problems[1]


def test_a_value_that_the_constructor_refuses_is_named() -> None:
    with pytest.raises(ValueError, match="AdamW with .*weight_decay=-1.*Invalid weight_decay"):
        build_optimizer([{"params": [torch.nn.Parameter(torch.ones(1))]}], OptimizerOptions(optimizer_args=("weight_decay=-1",)))


def test_lion_follows_its_algorithm() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    expected, momentum = weight.detach().clone(), torch.zeros(2)
    for gradient in (torch.tensor([0.3, -0.2]), torch.tensor([-0.5, 0.1])):
        weight.grad = gradient.clone()
        optimizer.step()
        direction = torch.sign(0.9 * momentum + 0.1 * gradient)
        expected = expected - 0.1 * (direction + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(("text", "steps"), [("0", 0), ("100", 100), ("10%", 20), ("0.25", 50), ("1", 1)])
def test_warmup_is_steps_or_a_share(text: str, steps: int) -> None:
    assert warmup_steps(text, 200) == steps


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "150%"])
def test_a_warmup_that_is_neither_is_refused(text: str) -> None:
    assert f"--lr_warmup_steps {text}" in problems(ScheduleOptions(lr_warmup_steps=text))


def test_schedule_warms_up_and_decays() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = build_schedule(optimizer, ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps="10%"), 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[10] == 1 and rates[99] < 0.01 and rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)


def test_options_without_effect_are_refused() -> None:
    assert "no effect with --lr_scheduler cosine" in problems(ScheduleOptions(lr_scheduler="cosine", lr_scheduler_power=2.0))


def test_an_adafactor_that_finds_its_own_rate_is_refused() -> None:
    options = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=("relative_step=True",))
    assert "leave it out and give --learning_rate" in problems(options)
