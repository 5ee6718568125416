"""Options given in vain are said."""

import pytest

from library.core.command_line import OptionSet, parse_command_line
from library.models.architecture import architecture_named
from library.training.rules import RULES, without_effect
from library.training.run import option_groups

GIVEN = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--network_module", "networks.lora"]
IN_VAIN = {
    "max_train_steps": ["5", "--max_train_epochs", "1"],
    "text_encoder_lr": ["1", "--network_train_unet_only"],
    "unet_lr": ["1", "--network_train_text_encoder_only"],
    "network_dim": ["2", "--dim_from_weights", "--network_weights", "w"],
    "network_alpha": ["2", "--dim_from_weights", "--network_weights", "w"],
    "vae_batch_size": ["2"],
    "text_encoder_batch_size": ["2"],
    "text_cache_variants": ["4"],
    "skip_cache_check": [],
    "persistent_data_loader_workers": ["--max_data_loader_n_workers", "0"],
    "training_comment": ["c", "--no_metadata"],
}


def parse(*extra: str) -> OptionSet:
    return parse_command_line(option_groups(architecture_named("sdxl")), [*GIVEN, *extra], prog="test", about="test")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.option)
def test_each_rule_speaks_when_its_option_is_in_vain(rule: object) -> None:
    name = rule.option  # pyright: ignore[reportAttributeAccessIssue]
    assert any(sentence.startswith(f"--{name} has no effect: ") for sentence in without_effect(parse(f"--{name}", *IN_VAIN[name])))


def test_an_ordinary_command_hears_nothing() -> None:
    options = parse("--max_train_steps", "5", "--text_encoder_lr", "1e-4", "--network_dim", "4", "--cache_latents", "--vae_batch_size", "2")
    assert list(without_effect(options)) == []
