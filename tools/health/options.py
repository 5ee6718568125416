"""The options of a training run: what its script would refuse, and what has no effect."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from library.core.command_line import OptionSet, parse_command_line
from library.core.devices import best_device
from library.core.options import OptionError
from library.data.config import read_datasets
from library.data.options import DataOptions
from library.models.architecture import Architecture, architecture_named
from library.models.attention import refuse_attention
from library.models.presets import presets
from library.training.adapters import NetworkOptions, check_network_arguments
from library.training.compiling import refuse_compilation
from library.training.memory.options import MemoryOptions, refuse_memory_options, refuse_without_blocks
from library.training.misfits import refuse_misfits
from library.training.precision import PrecisionOptions, refuse_what_the_device_cannot
from library.training.retired import refused_options
from library.training.rules import without_effect
from library.training.run import option_groups
from tools.health.finding import Finding, Patient, fail, ok, warn

STAND_INS = {"--output_dir": ".", "--network_module": "networks.lora"}
"""Options that a training script must have and the doctor need not -> what is taken for the rest of the checks."""
MEND = "change the option as the line says"


def training_options(patient: Patient) -> Iterator[Finding]:
    """Everything that the script says before it loads models, and whether the model files are what they should be."""
    if patient.family is None or not patient.arguments:
        return
    arch = architecture_named(patient.family)
    try:
        options = parsed(arch, patient.arguments)
    except OptionError as error:
        yield from (fail("options", problem, MEND) for problem in error.problems)
        return
    found = [warn("options", sentence, "leave it out") for sentence in without_effect(options)]
    for refuse in _refusals(arch, options, best_device()):
        try:
            refuse()
        except ValueError as error:
            found += [fail("options", problem, MEND) for problem in str(error).splitlines()]
    yield from found or [ok("options", f"{len(options.given)} options of {arch.title}, none of them refused")]


def parsed(arch: Architecture, arguments: Sequence[str]) -> OptionSet:
    """The options of a family's training script; what is required and neither a model nor given is filled in. Raises `OptionError`."""
    try:
        return _parsed(arch, arguments)
    except OptionError as error:
        missing = [flag for flag in STAND_INS if any(problem.startswith(f"{flag} is required") for problem in error.problems)]
        if not missing:
            raise
        return _parsed(arch, [*arguments, *(word for flag in missing for word in (flag, STAND_INS[flag]))])


def _parsed(arch: Architecture, arguments: Sequence[str]) -> OptionSet:
    return parse_command_line(
        option_groups(arch), arguments, prog="python -m tools.doctor", about="", refuse=refused_options(arch),
        presets=presets(arch),
    )  # fmt: skip


def _refusals(arch: Architecture, options: OptionSet, device: torch.device) -> Iterator[Callable[[], Any]]:
    """What a training script asks of its options before it loads anything, one process and this device given."""
    precision, model_options = options[PrecisionOptions], options[arch.ModelOptions]
    yield lambda: refuse_what_the_device_cannot(precision, device)
    yield lambda: refuse_memory_options(options, device)
    yield lambda: check_network_arguments(arch, options[NetworkOptions])
    yield lambda: refuse_without_blocks(arch, options[MemoryOptions], model_options)
    yield lambda: refuse_attention(model_options, device, precision.weight_dtype)
    yield lambda: refuse_compilation(arch, options, device)
    yield lambda: refuse_misfits(options, 1)
    yield lambda: read_datasets(options[DataOptions], arch.default_resolution)
    yield lambda: (arch.text_identity(model_options), arch.outlined(model_options))  # are the files there; what do they say of themselves
