"""Which engine a run has: as accelerate was launched, and as `--deepspeed` says."""

from typing import Any

from accelerate import Accelerator

from library.core.command_line import OptionSet
from library.core.options import OptionError
from library.data.dataset import TrainingData
from library.models.architecture import Architecture
from library.training.distributed import DistributedOptions
from library.training.parallel import fsdp, zero
from library.training.parallel.engine import Engine
from library.training.parallel.fsdp import ShardedEngine
from library.training.parallel.zero import ZeroEngine
from library.training.precision import PrecisionOptions


def accelerator_arguments(options: OptionSet) -> dict[str, Any]:
    """What `accelerate.Accelerator` is made with for the processes of a run. Raises `OptionError` as `zero.plugin_of` does."""
    plugin = zero.plugin_of(options)
    return {
        "mixed_precision": options[PrecisionOptions].mixed_precision if plugin is None else "no",  # see `ZeroEngine`
        "deepspeed_plugin": plugin,
        "kwargs_handlers": options[DistributedOptions].handlers(),
    }


def engine_of(accelerator: Accelerator, options: OptionSet) -> Engine:
    """The engine of the processes there are."""
    if zero.is_asked(options[DistributedOptions]):
        return ZeroEngine(accelerator, options[PrecisionOptions].weight_dtype)
    if accelerator.num_processes > 1 and fsdp.is_asked():
        return ShardedEngine(accelerator)
    return Engine(accelerator)


def refuse_engine(engine: Engine, arch: Architecture, options: OptionSet) -> None:
    """Raise `OptionError` with all that the engine cannot do of what is asked; before anything is loaded."""
    if problems := list(engine.refusals(arch, options)):
        raise OptionError(problems)


def refuse_data(engine: Engine, data: TrainingData) -> None:
    """Raise `OptionError` for data that the engine cannot train on; before the models are loaded."""
    if problems := list(engine.data_refusals(data)):
        raise OptionError(problems)
