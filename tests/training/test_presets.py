"""The presets of every family: plain files of known options, each line with its reason, each within its card."""

import re
import tomllib
from pathlib import Path

import pytest

from library.core.command_line import OptionSet, parse_command_line
from library.data.options import DataOptions
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.models.presets import presets
from library.training.forecast.memory import MemoryFacts, forecast_run
from library.training.forecast.phases import Shape
from library.training.rules import without_effect
from library.training.run import option_groups

NAMES = ("8gb", "12gb", "16gb", "24gb", "48gb")
FILES = {"anima": ("--qwen3", "absent", "--vae", "absent")}
MARGIN = 0.92  # of a card: the rest is a desktop's, and the estimate's error
RANK = 32


@pytest.fixture(params=architecture_names())
def arch(request: pytest.FixtureRequest) -> Architecture:
    """Every family, one after the other."""
    return architecture_named(request.param)


def read(arch: Architecture, file: Path) -> OptionSet:
    """A preset read as a config file is, with the options that every run needs."""
    argv = ["--config_file", str(file), "--pretrained_model_name_or_path", "absent.safetensors", *FILES.get(arch.name, ())]
    needed = ["--network_module", "networks.lora", "--network_dim", str(RANK), "--output_dir", "unused"]
    return parse_command_line(option_groups(arch), [*argv, *needed], prog="test", about="test")


def worst_step(arch: Architecture, options: OptionSet) -> MemoryFacts:
    """The memory of a run at 1024 x 1024 with previews of that size."""
    data = options[DataOptions]
    shape = Shape(width=1024, height=1024, batch=data.train_batch_size)
    drawn = Shape(width=1024, height=1024, batch=1)
    return forecast_run(arch, options, [shape], text_is_cached=data.caches_text, drawn=drawn).memory


def test_every_family_has_every_preset_smallest_card_first(arch: Architecture) -> None:
    assert tuple(presets(arch)) == NAMES


def test_every_line_says_why(arch: Architecture) -> None:
    for file in presets(arch).values():
        lines = [line for line in file.read_text().splitlines() if line]
        assert all(line.startswith("#") or re.search(r"\S\s+# \w+", line) for line in lines), file


def test_a_preset_reads_without_a_word_of_complaint(arch: Architecture) -> None:
    for file in presets(arch).values():
        assert list(without_effect(read(arch, file))) == [], file


def test_no_preset_says_what_a_default_says(arch: Architecture) -> None:
    for file in presets(arch).values():
        given = tomllib.loads(file.read_text())
        assert {name: value for name, value in given.items() if value is False} == {}


@pytest.mark.slow
def test_the_preset_of_the_smallest_card_fits_it(arch: Architecture) -> None:
    """It takes most of a minute. `benchmarks.memory --size full` tells of all presets."""
    facts = worst_step(arch, read(arch, presets(arch)["8gb"]))
    assert facts.gpu_peak <= MARGIN * 8 * 2**30
