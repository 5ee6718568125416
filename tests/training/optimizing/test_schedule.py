"""Schedules have the shapes of their formulas, and options that a shape does not read are said."""

import math
from collections.abc import Callable

import pytest
import torch

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.core.rules import without_effect
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer
from library.training.optimizing.schedule import READS, SHAPES, ScheduleOptions, build_schedule, steps_of

STEPS, WARMUP, DECAY, FLOOR = 100, 10, 30, 0.2


def problems(**options: object) -> str:
    return "\n".join(ScheduleOptions(**options).check())  # pyright: ignore[reportArgumentType]


def rates(options: ScheduleOptions, total: int = STEPS, *, base: float = 1.0) -> list[float]:
    """The rate of every step of a run."""
    assert not list(options.check())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=base, momentum=0.9)
    schedule = build_schedule(optimizer, options, total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def warm(after: Callable[[float, int], float]) -> Callable[[int], float]:
    """A linear warm-up, then a function of the share of what remains, and of the step."""
    return lambda step: step / WARMUP if step < WARMUP else after((step - WARMUP) / (STEPS - WARMUP), step)


def cosine(z: float) -> float:
    return (1 + math.cos(math.pi * z)) / 2


def stable(step: int) -> float:
    """The warm-up of transformers' begins at the floor."""
    share = step / WARMUP if step < WARMUP else cosine(max(0, step - (STEPS - DECAY)) / DECAY)
    return FLOOR + (1 - FLOOR) * share


CLOSED_FORMS = {
    "constant": ({}, warm(lambda z, step: 1)),
    "constant_with_warmup": ({}, warm(lambda z, step: 1)),
    "linear": ({}, warm(lambda z, step: 1 - z)),
    "cosine": ({}, warm(lambda z, step: cosine(z))),
    "cosine_with_restarts": ({"lr_scheduler_num_cycles": 3}, warm(lambda z, step: cosine(3 * z % 1))),
    "polynomial": ({"lr_scheduler_power": 2.0}, warm(lambda z, step: 1e-7 + (1 - 1e-7) * (1 - z) ** 2)),
    "piecewise_constant": (
        {"lr_warmup_steps": 0, "lr_scheduler_args": ("step_rules=1:10,0.1:20,0.01",)},
        lambda step: 1 if step < 10 else 0.1 if step < 20 else 0.01,
    ),
    "inverse_sqrt": ({"lr_scheduler_timescale": 7}, warm(lambda z, step: math.sqrt(7 / (step - WARMUP + 7)))),
    "cosine_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": FLOOR, "lr_scheduler_num_cycles": 3},
        warm(lambda z, step: FLOOR + (1 - FLOOR) * cosine(3 * z)),
    ),
    "cosine_warmup_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": FLOOR, "lr_scheduler_args": ("warmup_lr_rate=0.5",)},
        lambda step: (
            0.5 + 0.5 * step / (WARMUP - 1) if step < WARMUP else FLOOR + (1 - FLOOR) * cosine((step - WARMUP + 1) / (STEPS - WARMUP))
        ),
    ),
    "warmup_stable_decay": ({"lr_decay_steps": DECAY, "lr_scheduler_min_lr_ratio": FLOOR}, stable),
    "rex": ({"lr_scheduler_min_lr_ratio": FLOOR}, warm(lambda z, step: FLOOR + (1 - FLOOR) * (1 - z) / (0.5 + 0.5 * (1 - z)))),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_each_shape_is_its_formula(name: str) -> None:
    given, formula = CLOSED_FORMS[name]
    options = ScheduleOptions(lr_scheduler=name, **{"lr_warmup_steps": WARMUP, **given})
    assert rates(options) == pytest.approx([formula(step) for step in range(STEPS)], abs=1e-9)


def test_every_shape_has_its_formula_here() -> None:
    assert set(SHAPES) == {*CLOSED_FORMS, "adafactor"}


@pytest.mark.parametrize("name", ["AdaFactor", "adafactor:1e-3"])
def test_adafactors_own_schedule_leaves_the_rate_to_adafactor(name: str) -> None:
    options = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=("relative_step=True",))
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}], options)
    assert set(build_schedule(optimizer, ScheduleOptions(lr_scheduler=name), STEPS).get_last_lr()) == {options.learning_rate}


def test_rex_ends_at_zero_and_stays_above_linear() -> None:
    found = rates(ScheduleOptions(lr_scheduler="rex"), 50)
    assert found[0] == 1 and found[-1] < 0.05 and all(rate >= 1 - step / 50 for step, rate in enumerate(found))


def test_a_schedule_scales_every_groups_own_rate() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1e-3, 1e-4)]
    optimizer = torch.optim.SGD(groups)
    schedule = build_schedule(optimizer, ScheduleOptions(lr_scheduler="linear"), 4)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.75e-3, 0.75e-4])


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "cosineannealinglr", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_class_of_torch_goes_by_its_name_or_path(name: str) -> None:
    options = ScheduleOptions(lr_scheduler_type=name, lr_scheduler_args=("T_max=100", "eta_min=0.2"))
    assert rates(options) == pytest.approx([0.2 + 0.8 * cosine(step / 100) for step in range(STEPS)])


@pytest.mark.parametrize(("text", "steps"), [("0", 0), ("100", 100), ("10%", 20), ("0.25", 50), ("1", 1), ("100%", 200)])
def test_a_length_is_steps_or_a_share(text: str, steps: int) -> None:
    assert steps_of(text, 200, "--lr_warmup_steps") == steps


@pytest.mark.parametrize("name", ["lr_warmup_steps", "lr_decay_steps"])
@pytest.mark.parametrize("text", ["many", "-1", "1.5", "150%", "inf", "nan", "1e400"])
def test_a_length_that_is_neither_is_refused(name: str, text: str) -> None:
    assert problems(**{name: text}).startswith(f"--{name} {text}: give")


@pytest.mark.parametrize(("given", "message"), [
    ({"lr_scheduler": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'?"),
    ({"lr_scheduler": "reduce_lr_on_plateau"}, "follows a measured loss"),
    ({"lr_scheduler_type": "ReduceLROnPlateau"}, "follows a measured loss"),
    ({"lr_scheduler_type": "CosineAnealingLR"}, "did you mean 'CosineAnnealingLR'"),
    ({"lr_scheduler_type": "no.such.Schedule"}, "cannot import no.such.Schedule"),
    ({"lr_scheduler_type": "torch.nn.Linear"}, "is not a torch LRScheduler class"),
    ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_args: StepLR needs step_size=..."),
    ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=a",)}, "'a' is not a whole number"),
    ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("stepsize=2",)}, "did you mean 'step_size'"),
    ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_warmup_steps=2",)}, "is set by --lr_warmup_steps"),
    ({"lr_scheduler": "piecewise_constant"}, "needs step_rules=..."),
    ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=x",)}, "--lr_scheduler piecewise_constant step_rules=x"),
    ({"lr_scheduler": "cosine_with_min_lr"}, "needs --lr_scheduler_min_lr_ratio, for example 0.1"),
    ({"lr_scheduler": "warmup_stable_decay"}, "needs --lr_decay_steps, for example 20%"),
    ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": "60%", "lr_decay_steps": "0.5"}, "together longer than the run"),
    ({"lr_scheduler_min_lr_ratio": 2.0}, "must lie between 0 and 1"), ({"lr_scheduler_timescale": 0}, "must be at least 1"),
    ({"lr_scheduler_num_cycles": 0}, "must be at least 1"),
])  # fmt: skip
def test_what_no_schedule_can_be_made_of_is_said_at_once(given: dict[str, object], message: str) -> None:
    assert message in problems(**given)


def test_a_warm_up_and_decay_longer_than_the_run_are_refused() -> None:
    options = ScheduleOptions(lr_scheduler="warmup_stable_decay", lr_warmup_steps=60, lr_decay_steps=60)
    with pytest.raises(ValueError, match="--lr_warmup_steps 60 and --lr_decay_steps 60: together longer than the run"):
        build_schedule(torch.optim.SGD([torch.zeros(1)]), options, STEPS)


def test_a_warm_up_that_outlasts_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rates(ScheduleOptions(lr_warmup_steps=20), 10)
    assert "--lr_warmup_steps 20: the run ends after 10" in caplog.text


GIVEN = {
    "lr_warmup_steps": "5", "lr_decay_steps": "5", "lr_scheduler_num_cycles": "2", "lr_scheduler_power": "2",
    "lr_scheduler_timescale": "9", "lr_scheduler_min_lr_ratio": "0.5",
}  # fmt: skip
NEEDED = {"piecewise_constant": ["--lr_scheduler_args", "step_rules=1:5,0.1"]}


@pytest.mark.parametrize("option", READS.values())
@pytest.mark.parametrize("shape", SHAPES)
def test_an_option_acts_on_a_shape_or_is_said_to_have_no_effect(shape: str, option: str) -> None:
    argv = ["--lr_scheduler", shape, f"--{option}", GIVEN[option], *NEEDED.get(shape, [])]
    try:
        options = parse_command_line([ScheduleOptions], argv, prog="test", about="test")
    except OptionError as error:
        assert "needs" in str(error)  # another option, without which there is no such shape
        return
    said = list(without_effect(options, ScheduleOptions.RULES))
    assert [sentence.split()[0] for sentence in said] == ([] if option in SHAPES[shape].options else [f"--{option}"])


def test_a_class_of_torch_reads_none_of_the_named_shapes_options() -> None:
    argv = ["--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "3"]
    said = list(without_effect(parse_command_line([ScheduleOptions], argv, prog="test", about="test"), ScheduleOptions.RULES))
    assert [sentence.split()[0] for sentence in said] == ["--lr_scheduler", "--lr_warmup_steps"]
