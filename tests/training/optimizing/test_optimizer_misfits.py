"""What does not go together is said at once, before models are loaded."""

import pytest

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.models.architecture import architecture_named
from library.training.misfits import refuse_misfits, refuse_unfit_schedule
from library.training.run import option_groups

GIVEN = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--network_module", "networks.lora"]


def parse(*extra: str) -> OptionSet:
    return parse_command_line(option_groups(architecture_named("sdxl")), [*GIVEN, *extra], prog="test", about="test")


@pytest.mark.parametrize(("argv", "message"), [
    ("--optimizer_type AdamWScheduleFree --lr_scheduler cosine",
     "--lr_scheduler cosine: AdamWScheduleFree needs no schedule; use --lr_scheduler constant without warm-up "
     "and --optimizer_args warmup_steps=N"),
    ("--optimizer_type AdamWScheduleFree --lr_warmup_steps 10", "needs no schedule"),
    ("--optimizer_type RAdamScheduleFree --lr_scheduler linear", "use --lr_scheduler constant without warm-up$"),
    ("--optimizer_type SGDScheduleFree --lr_scheduler_type StepLR --lr_scheduler_args step_size=1", "--lr_scheduler_type StepLR"),
    ("--lr_scheduler adafactor", "is for --optimizer_type Adafactor with --optimizer_args relative_step=True"),
    ("--optimizer_type adafactor --lr_scheduler adafactor:1e-3", "relative_step=True"),
    ("--optimizer_type adafactor --optimizer_args relative_step=True --lr_scheduler cosine", "use --lr_scheduler adafactor"),
    ("--optimizer_type adafactor --optimizer_args relative_step=True --lr_warmup_steps 5", "without warm-up"),
    ("--fused_backward_pass --gradient_accumulation_steps 2", "--gradient_accumulation_steps 2"),
    ("--optimizer_type AdamWScheduleFree --scale_weight_norms 1", "AdamWScheduleFree would average weights from before they were shrunk"),
    ("--fused_backward_pass --mixed_precision fp16", "use --mixed_precision bf16"),
    ("--quantize_base nf4 --network_module lycoris.kohya", "--quantize_base nf4: lycoris.kohya cannot read packed weights"),
    ("--fp8_scaled --network_module lycoris.kohya --network_args bypass_mode=True", "--fp8_scaled: lycoris.kohya cannot read packed"),
    ("--fp8_base_unet --mixed_precision bf16 --network_module lycoris.kohya", "--fp8_base_unet: lycoris.kohya .*bypass_mode=True"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(argv: str, message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        refuse_misfits(parse(*argv.split()), 1)


def test_a_fused_backward_pass_is_refused_over_processes() -> None:
    with pytest.raises(OptionError, match="before the 2 processes have exchanged gradients"):
        refuse_misfits(parse("--fused_backward_pass"), 2)


def test_all_misfits_are_said_at_once() -> None:
    argv = "--fused_backward_pass --gradient_accumulation_steps 2 --lr_scheduler adafactor"
    with pytest.raises(OptionError) as caught:
        refuse_misfits(parse(*argv.split()), 2)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("argv", [
    "", "--lr_scheduler rex --lr_warmup_steps 10%", "--optimizer_type AdamWScheduleFree", "--fused_backward_pass",
    "--optimizer_type adafactor --optimizer_args relative_step=True", "--optimizer_type Prodigy --lr_scheduler cosine --learning_rate 1",
    "--optimizer_type adafactor --optimizer_args relative_step=True --lr_scheduler adafactor --lr_warmup_steps 5",
])  # fmt: skip
def test_what_goes_together_is_taken(argv: str) -> None:
    refuse_misfits(parse(*argv.split()), 1)


@pytest.mark.parametrize(("argv", "message"), [
    ("--lr_scheduler warmup_stable_decay --lr_warmup_steps 3 --lr_decay_steps 3", "together longer than the run"),
    ("--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=0.1", "^--lr_scheduler_type OneCycleLR max_lr=0.1: You must define"),
    ("--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=0.1 total_steps=4", "fails in a run of 5 steps: Tried to step 5 times"),
    ("--lr_scheduler_type LambdaLR --lr_scheduler_args lr_lambda=foo", "--lr_scheduler_type LambdaLR lr_lambda=foo"),
    ("--lr_scheduler_type LRScheduler", "--lr_scheduler_type LRScheduler: NotImplementedError"),
    ("--lr_scheduler polynomial --lr_scheduler_power -1", "fails in a run of 5 steps"),
    ("--lr_scheduler polynomial --learning_rate 1e-8", "lr_end .* must be smaller than initial lr"),
    ("--lr_scheduler cosine_with_min_lr --learning_rate 0 --lr_scheduler_args min_lr=1e-6", "--lr_scheduler cosine_with_min_lr"),
])  # fmt: skip
def test_a_schedule_that_would_stop_the_run_is_refused_by_its_optimizer_and_length(argv: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unfit_schedule(parse(*argv.split()), 5)


@pytest.mark.parametrize("argv", [
    "--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=0.1 total_steps=5", "--lr_scheduler_type CyclicLR --lr_scheduler_args "
    "base_lr=1e-4 max_lr=1e-3", "--lr_scheduler rex", "--lr_scheduler polynomial", "--lr_scheduler cosine", "--lr_scheduler inverse_sqrt",
    "--optimizer_type adafactor --optimizer_args relative_step=True --lr_scheduler adafactor", "--optimizer_type AdamWScheduleFree",
])  # fmt: skip
def test_a_schedule_that_lasts_is_taken(argv: str) -> None:
    refuse_unfit_schedule(parse(*argv.split()), 5)


@pytest.mark.parametrize("argv", [
    "--quantize_base nf4", "--fp8_scaled --network_module networks.lokr",
    "--fp8_base --mixed_precision bf16 --network_module lycoris.kohya --network_args algo=loha bypass_mode=True",
])  # fmt: skip
def test_a_stored_base_is_for_modules_that_can_use_it(argv: str) -> None:
    refuse_misfits(parse(*argv.split()), 1)
