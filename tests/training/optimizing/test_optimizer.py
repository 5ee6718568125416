"""Optimizers are found by name, checked, and lower a loss."""

import math

import pytest
import torch
from optimizer_cases import CPU_OPTIMIZERS, options_of, trained

from library.core.command_line import parse_command_line
from library.core.options import OptionError
from library.core.rules import without_effect
from library.training.optimizing.lion import Lion
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer, optimizer_arguments, optimizer_class


def problems(options: OptimizerOptions) -> str:
    return "\n".join(options.check())


@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
def test_every_named_optimizer_lowers_a_quadratic(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    before = weight.square().mean().item()
    trained(name, weight, steps=80)
    assert weight.square().mean().item() < 0.97 * before


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit", "SGDNesterov8bit"])
def test_states_of_8_bit_optimizers_take_a_byte_each_on_a_cpu_too(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = trained(name, weight, steps=1)
    assert optimizer.state[weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(("name", "path"), [
    ("adamw", "torch.optim.AdamW"), ("", "torch.optim.AdamW"), ("PRODIGY", "prodigyopt.Prodigy"), ("rmsprop", "torch.optim.RMSprop"),
    ("DAdaptation", "dadaptation.experimental.DAdaptAdamPreprint"), ("Adafactor", "transformers.optimization.Adafactor"),
    ("torch.optim.Adafactor", "torch.optim.Adafactor"),
])  # fmt: skip
def test_names_in_any_case_and_paths_find_their_class(name: str, path: str) -> None:
    found = optimizer_class(name)
    module, _, attribute = path.rpartition(".")
    assert found.__name__ == attribute and found.__module__.startswith(module.partition(".")[0])


def test_nesterov_is_on_in_the_optimizer_named_after_it() -> None:
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], options_of("SGDNesterov"))
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


def test_an_8_bit_sgd_without_nesterov_is_said(caplog: pytest.LogCaptureFixture) -> None:
    build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], options_of("SGDNesterov8bit"))
    assert "has momentum, but not Nesterov's" in caplog.text


def test_what_a_constructor_refuses_is_said_with_its_arguments() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-3}
    with pytest.raises(ValueError, match="AdamW with differentiable=True, fused=True.*does not support"):
        build_optimizer([group], OptimizerOptions(optimizer_args=("differentiable=True",)))


def test_a_dotted_path_is_taken() -> None:
    assert optimizer_class("torch.optim.RAdam") is torch.optim.RAdam


@pytest.mark.parametrize(("name", "message"), [
    ("AdmW", "did you mean 'AdamW'"), ("torch.optim.Nope", "cannot import"), ("no.such", "cannot import"),
    ("torch.nn.Linear", "is not a torch Optimizer"), ("LBFGS", "several times a step"), ("SparseAdam", "for sparse gradients only"),
])  # fmt: skip
def test_an_unknown_optimizer_is_refused(name: str, message: str) -> None:
    assert message in problems(OptimizerOptions(optimizer_type=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device can page")
def test_a_paged_optimizer_without_cuda_says_what_to_use() -> None:
    for name, instead in (("PagedAdamW8bit", "AdamW8bit"), ("PagedAdamW32bit", "AdamW"), ("bitsandbytes.optim.PagedLion", "Lion")):
        assert problems(OptimizerOptions(optimizer_type=name)).endswith(f"need a CUDA device; use {instead}")


def test_arguments_are_checked_against_the_constructor() -> None:
    assert optimizer_arguments(torch.optim.AdamW, ["betas=0.9,0.99", "weight_decay=1e-2", "amsgrad=True"]) == {
        "betas": (0.9, 0.99), "weight_decay": 0.01, "amsgrad": True,
    }  # fmt: skip
    with pytest.raises(OptionError) as caught:
        optimizer_arguments(torch.optim.AdamW, ["wieght_decay=1", "lr=1"])
    assert "did you mean 'weight_decay'" in caught.value.problems[0] and "--learning_rate" in caught.value.problems[1]


def test_an_infinite_rate_is_refused_by_its_option() -> None:
    said = problems(OptimizerOptions(unet_lr=math.inf, text_encoder_lr=(1e-4, math.inf)))
    assert said.splitlines() == ["--unet_lr inf: must be finite", "--text_encoder_lr inf: must be finite"]


def test_a_value_that_the_constructor_refuses_is_named() -> None:
    with pytest.raises(ValueError, match="AdamW with .*weight_decay=-1.*Invalid weight_decay"):
        build_optimizer([{"params": [torch.nn.Parameter(torch.ones(1))]}], OptimizerOptions(optimizer_args=("weight_decay=-1",)))


@pytest.mark.parametrize(("optimizer", "argument", "message"), [
    ("AdamW", "betas=0.9", "--optimizer_args betas: needs 2 values, has 1; for example betas=0.9,0.999"),
    ("AdamW", "betas=0.9,x", "--optimizer_args betas: 'x' is not a number; for example betas=0.9,0.999"),
    ("AdamW", "weight_decay=high", "--optimizer_args weight_decay: 'high' is not a number"),
    ("AdamW", "amsgrad=2", "--optimizer_args amsgrad: '2' is not true or false"),
    ("AdamW8bit", "min_8bit_size=x", "--optimizer_args min_8bit_size: 'x' is none of: whole number or number"),
    ("Prodigy", "betas=0.9", "needs 2 values, has 1; for example betas=0.9,0.999"),
    ("AdEMAMix8bit", "betas=0.9,0.99", "needs 3 values, has 2"),
    ("Adafactor", "eps=1", "needs 2 values, has 1; for example eps=1e-30,0.001"),
    ("AdamWScheduleFree", "warmup_steps=0.5", "'0.5' is not a whole number"),
    ("AdamW", "weight_decay=-1", "--optimizer_type AdamW with weight_decay=-1.0, fused=True, lr=2e-06: Invalid weight_decay"),
    ("Adafactor", "warmup_init=True", "requires `relative_step=True`"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_said_with_what_is_needed(optimizer: str, argument: str, message: str) -> None:
    assert message in problems(OptimizerOptions(optimizer_type=optimizer, optimizer_args=(argument,)))


def test_all_wrong_arguments_are_said_at_once() -> None:
    options = OptimizerOptions(optimizer_args=("betas=0.9", "wd=1", "eps=small"), learning_rate=-1)
    assert len(problems(options).splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "value"), [("d_coef=0.5", 0.5), ("growth_rate=inf", float("inf")), ("beta3=none", None), ("d0=1e-5", 1e-5)]
)
def test_values_have_the_type_of_the_default(text: str, value: object) -> None:
    (found,) = optimizer_arguments(optimizer_class("Prodigy"), [text]).values()
    assert found == value and type(found) is type(value)


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


def test_an_adafactor_that_finds_its_own_rate_reads_no_learning_rate(caplog: pytest.LogCaptureFixture) -> None:
    argv = ["--optimizer_type", "adafactor", "--optimizer_args", "relative_step=True", "--learning_rate", "1", "--unet_lr", "0"]
    options = parse_command_line([OptimizerOptions], argv, prog="test", about="test")
    assert [sentence.split()[0] for sentence in without_effect(options, OptimizerOptions.RULES)] == ["--learning_rate"]
    steps = {}
    caplog.set_level("INFO", logger="hadron")
    for rate in (1.0, 1e-6):
        weight = torch.nn.Parameter(torch.ones(4, 4))
        trained("Adafactor", weight, steps=3, learning_rate=rate, optimizer_args=("relative_step=True",))
        steps[rate] = weight.detach()
    assert torch.equal(*steps.values()) and not torch.equal(steps[1.0], torch.ones(4, 4))
    assert "Adafactor finds its own rate" in caplog.text


FACTORED = ["Prodigy", "DAdaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD"]


@pytest.mark.parametrize("name", FACTORED)
def test_optimizers_that_find_one_rate_refuse_two_factors(name: str) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in (1.0, 16.0)]
    with pytest.raises(ValueError, match="finds one rate for all weights, but was given the factors 1, 16; give one --learning_rate"):
        build_optimizer(groups, options_of(name))


@pytest.mark.parametrize(("name", "rate", "speaks"), [("Prodigy", 1e-4, True), ("Prodigy", 1.0, False), ("AdamW", 1e-4, False)])
def test_a_factor_far_from_one_is_said(name: str, rate: float, speaks: bool, caplog: pytest.LogCaptureFixture) -> None:
    build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate}], options_of(name, learning_rate=rate))
    assert ("times the learning rate 0.0001; 1 is usual" in caplog.text) is speaks
