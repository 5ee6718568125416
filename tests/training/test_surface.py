"""sd-scripts' whole command line is known: each option is declared here or refused with a reason."""

import json
from pathlib import Path

import pytest

from library.core.command_line import parse_command_line
from library.core.options import OptionError, declared
from library.inference import not_yet as generation_not_yet
from library.inference import script as generation
from library.inference.minimal import script as minimal
from library.models.architecture import architecture_named
from library.training import not_yet as training_not_yet
from library.training.run import option_groups

UPSTREAM = json.loads((Path(__file__).parent / "sd_scripts_options.json").read_text())
SDXL, ANIMA = architecture_named("sdxl"), architecture_named("anima")
GROUPS = {
    "sdxl_train_network.py": (option_groups(SDXL), {**training_not_yet.NOT_YET, **SDXL.refused}),
    "anima_train_network.py": (option_groups(ANIMA), {**training_not_yet.NOT_YET, **ANIMA.refused}),
    "gen_img.py": (generation.option_groups(SDXL), {**generation_not_yet.NOT_YET, **SDXL.refused}),
    "anima_minimal_inference.py": (minimal.option_groups(ANIMA), minimal.refused(ANIMA)),
}
OTHER_DEFAULT = {
    "optimizer_type": "AdamW is what sd-scripts takes for an empty name",
    "text_encoder_lr": "an empty list",
    "console_log_level": "INFO is what none means",
    "max_embeddings_multiples": "1 is what none means",
    "vae_batch_size": "whole numbers only",
    "lora_multiplier": "1.0 for every file that has none",
}
"""Options whose default is written another way than in sd-scripts -> why that is the same."""


@pytest.mark.parametrize("script", GROUPS)
def test_every_option_is_declared_or_refused_and_none_is_both(script: str) -> None:
    groups, refused = GROUPS[script]
    ours = {entry.name for group in groups for entry in declared(group)} | {"config_file"}
    aliases = {flag[2:] for group in groups for entry in declared(group) for flag in entry.flags}
    assert set(UPSTREAM[script]) - ours - aliases == set(refused) & (set(UPSTREAM[script]) - ours - aliases)
    assert not ours & set(refused)


@pytest.mark.parametrize("script", GROUPS)
def test_defaults_are_those_of_sd_scripts(script: str) -> None:
    groups, _ = GROUPS[script]
    ours = {entry.name: entry for group in groups for entry in declared(group)}
    other = {}
    for name, upstream in UPSTREAM[script].items():
        if name in ours and not ours[name].required and name not in OTHER_DEFAULT:
            default = list(ours[name].default) if isinstance(ours[name].default, tuple) else ours[name].default
            if default != upstream["default"] and not (not default and not upstream["default"]):
                other[name] = (default, upstream["default"])
    assert not other


def test_a_later_option_is_refused_by_name() -> None:
    groups, refused = GROUPS["sdxl_train_network.py"]
    with pytest.raises(OptionError, match="--min_snr_gamma: an option of sd-scripts that this version does not have yet"):
        parse_command_line(groups, ["--min_snr_gamma", "5"], prog="x", about="x", refuse=refused)
