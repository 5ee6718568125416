"""Optimizer, schedule and the rest of a run's options together: what cannot go with what is said before models are loaded."""

from collections.abc import Iterator

from library.core.command_line import OptionSet
from library.core.options import OptionError
from library.training.adapters import NetworkOptions
from library.training.length import RunOptions
from library.training.optimizing import schedule
from library.training.optimizing.average import AverageOptions
from library.training.optimizing.averaging import is_schedule_free
from library.training.optimizing.optimizer import OptimizerOptions, optimizer_class, small_optimizer
from library.training.optimizing.schedule import ScheduleOptions
from library.training.precision import PrecisionOptions
from networks.protocol import network_modules

LEAVES_WEIGHTS = "bypass_mode=True"  # LyCORIS' argument: the delta is added to a layer's output


def refuse_misfits(options: OptionSet, processes: int) -> None:
    """Raise `OptionError` with everything that does not go together; `processes` is the number of ranks."""
    optimizer = options[OptimizerOptions]
    kind = optimizer_class(optimizer.optimizer_type)
    problems = list(schedule.misfits(kind, options[ScheduleOptions], relative_step=optimizer.relative_step))
    if is_schedule_free(kind) and options[NetworkOptions].scale_weight_norms is not None:
        problems.append(f"--scale_weight_norms: {kind.__name__} would average weights from before they were shrunk; leave it out")
    problems += options[AverageOptions].misfits(kind)
    if optimizer.fused_backward_pass:
        problems += _against_fusing(options, processes)
    problems += _against_storing(options[PrecisionOptions], options[NetworkOptions])
    if problems:
        raise OptionError(problems)


def refuse_unfit_schedule(options: OptionSet, steps: int) -> None:
    """Raise `ValueError` for a schedule that cannot be made for the optimizer, or that would fail in a run of so many steps."""
    schedule.try_schedule(small_optimizer(options[OptimizerOptions]), options[ScheduleOptions], steps)


def _against_fusing(options: OptionSet, processes: int) -> Iterator[str]:
    accumulated = options[RunOptions].gradient_accumulation_steps
    if accumulated > 1:
        yield f"--fused_backward_pass: frees a gradient before --gradient_accumulation_steps {accumulated} adds the next; leave one out"
    if processes > 1:
        yield f"--fused_backward_pass: weights are stepped before the {processes} processes have exchanged gradients; leave it out"
    if options[PrecisionOptions].mixed_precision == "fp16":
        yield "--fused_backward_pass: fp16 looks at all gradients before it steps; use --mixed_precision bf16"


def _against_storing(precision: PrecisionOptions, network: NetworkOptions) -> Iterator[str]:
    """A third-party module takes the `weight` of a layer for its floats; only where it leaves it alone may that be fp8."""
    if precision.storage is None or network.network_module in network_modules():
        return
    leaves_weights = any(given.replace(" ", "").lower() == LEAVES_WEIGHTS.lower() for given in network.network_args)
    if precision.storage == "fp8" and not leaves_weights:
        advice = f"give --network_args {LEAVES_WEIGHTS}, where it knows that, or leave one out"
        yield f"{precision.storage_option}: {network.network_module} computes with the weights of its layers, and cannot in fp8; {advice}"
    if precision.storage != "fp8":
        yield f"{precision.storage_option}: {network.network_module} cannot read packed weights; leave one out, or use networks.lora"
