"""sd-scripts' whole command line is known: each option is declared here or refused with a reason."""

import json
import typing
from pathlib import Path
from typing import Any

import pytest

from library.core.options import Declared, OptionError, convert, declared, describe
from library.inference import not_yet as generation_not_yet
from library.inference import script as generation
from library.inference.minimal import script as minimal
from library.models.architecture import architecture_named
from library.training.retired import refused_options
from library.training.run import option_groups

UPSTREAM = json.loads((Path(__file__).parent / "sd_scripts_options.json").read_text())
SDXL, ANIMA = architecture_named("sdxl"), architecture_named("anima")
GROUPS = {
    "sdxl_train_network.py": (option_groups(SDXL), refused_options(SDXL)),
    "anima_train_network.py": (option_groups(ANIMA), refused_options(ANIMA)),
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
    "sample_sampler": "the family's own sampler, ddim for noise prediction",
}
"""Options whose default is written another way than in sd-scripts -> why that is the same."""


@pytest.mark.parametrize("script", GROUPS)
def test_every_option_is_declared_or_refused_and_none_is_both(script: str) -> None:
    groups, refused = GROUPS[script]
    ours = {entry.name for group in groups for entry in declared(group)} | {"config_file", "output_config"}
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


FEWER_CHOICES = {"save_model_as": ["ckpt", "pt"]}
"""Choices of sd-scripts that are refused by name."""


@pytest.mark.parametrize("script", GROUPS)
def test_values_are_of_the_kind_that_sd_scripts_takes(script: str) -> None:
    groups, _ = GROUPS[script]
    ours = {flag[2:]: entry for group in groups for entry in declared(group) for flag in entry.flags}
    other = {}
    for name, upstream in UPSTREAM[script].items():
        if name in ours and not takes(ours[name], upstream):
            other[name] = (describe(ours[name].kind), upstream["type"])
    assert not other


def takes(entry: Declared, upstream: dict[str, Any]) -> bool:
    """Does our option take values of sd-scripts' kind? Choices have a test of their own; what a text shall hold is the option's matter."""
    if upstream["type"] is None and not upstream["choices"]:
        return entry.is_flag
    samples = {"int": ["3"], "float": ["0.5"], "int_or_float": ["3", "0.1", "10%"]}
    texts = [] if upstream["choices"] else samples.get(upstream["type"], [])
    count = len(typing.get_args(entry.kind)) if entry.is_list and Ellipsis not in typing.get_args(entry.kind) else 1
    return not entry.is_flag and all(convert([text] * count if count > 1 else text, entry.kind, entry.name) for text in texts)


@pytest.mark.parametrize("script", GROUPS)
def test_choices_are_those_of_sd_scripts(script: str) -> None:
    groups, _ = GROUPS[script]
    ours = {flag[2:]: entry for group in groups for entry in declared(group) for flag in entry.flags}
    refused = {}
    for name, upstream in UPSTREAM[script].items():
        for choice in filter(None, upstream["choices"] or () if name in ours else ()):
            try:
                convert(choice, ours[name].kind, name)
            except OptionError:
                refused.setdefault(name, []).append(choice)
    assert refused == {name: choices for name, choices in FEWER_CHOICES.items() if name in refused}
