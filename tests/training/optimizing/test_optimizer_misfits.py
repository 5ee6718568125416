"""What does not go together is said at once, before models are loaded."""

import pytest

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.models.architecture import architecture_named
from library.training.misfits import refuse_misfits
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
    ("--optimizer_type SGDScheduleFree --lr_scheduler_type StepLR --lr_scheduler_args step_size=1", "--lr_scheduler StepLR"),
    ("--lr_scheduler adafactor", "is for --optimizer_type Adafactor with --optimizer_args relative_step=True"),
    ("--optimizer_type adafactor --lr_scheduler adafactor:1e-3", "relative_step=True"),
    ("--optimizer_type adafactor --optimizer_args relative_step=True --lr_scheduler cosine", "use --lr_scheduler adafactor"),
    ("--optimizer_type adafactor --optimizer_args relative_step=True --lr_warmup_steps 5", "without warm-up"),
    ("--fused_backward_pass --gradient_accumulation_steps 2", "--gradient_accumulation_steps 2"),
    ("--optimizer_type AdamWScheduleFree --scale_weight_norms 1", "AdamWScheduleFree would average weights from before they were shrunk"),
    ("--fused_backward_pass --mixed_precision fp16", "use --mixed_precision bf16"),
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
