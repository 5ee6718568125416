"""DeepSpeed's ZeRO, through accelerate: `--deepspeed`, or `accelerate launch --use_deepspeed`.

Stages 1 and 2 share out the optimizer's states and the gradients of the network, which are small; stage 3 the weights of the base too.
Weights keep their dtypes, and autocast is ours: DeepSpeed's own bf16 and fp16 would train the network in half precision.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer

from library.core.command_line import OptionSet
from library.core.options import OptionError
from library.data.dataset import TrainingData
from library.models.architecture import Architecture
from library.training.adapters import NetworkOptions
from library.training.compiling import CompileOptions
from library.training.distributed import DistributedOptions
from library.training.memory.options import MemoryOptions
from library.training.model import TrainingModel
from library.training.optimizing.optimizer import OptimizerOptions, optimizer_class
from library.training.parallel.engine import Engine
from library.training.parallel.refusals import needs_all_ranks, preserved_samples
from library.training.precision import PrecisionOptions
from networks.base import Adapter
from networks.protocol import network_modules

ELEMENTWISE = ("AdamW", "Adam", "SGD", "Lion", "NAdam", "RAdam", "Adagrad", "RMSprop")
"""Optimizers that step each number by itself: ZeRO flattens weights, and gives each rank a part of them."""
OWN_SECTIONS = {
    "bf16": "give --mixed_precision bf16", "fp16": "use --mixed_precision bf16", "optimizer": "give --optimizer_type",
    "scheduler": "give --lr_scheduler", "gradient_clipping": "give --max_grad_norm",
}  # fmt: skip


def is_asked(options: DistributedOptions) -> bool:
    """Whether a run is DeepSpeed's."""
    return options.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def plugin_of(options: OptionSet) -> DeepSpeedPlugin | None:
    """Accelerate's settings for DeepSpeed, None for other runs.

    Raises `OptionError` where the package is missing, where no launcher has started this process, and for a file of DeepSpeed's with
    sections that the training options stand for.
    """
    own = options[DistributedOptions]
    if not is_asked(own):
        return None
    if find_spec("deepspeed") is None:
        raise OptionError(["--deepspeed: the package is not installed; pip install deepspeed"])
    if "LOCAL_RANK" not in os.environ:
        raise OptionError(["--deepspeed: start the script with accelerate launch --use_deepspeed"])
    settings: dict[str, Any] = {"hf_ds_config": {"zero_optimization": own.zero_settings()}} if own.deepspeed else {}
    plugin = DeepSpeedPlugin(zero3_init_flag=False, **settings)
    config = plugin.deepspeed_config
    sections = [name for name in OWN_SECTIONS if _is_on(config.get(name))]
    if sections:
        raise OptionError([f"DeepSpeed's configuration, '{name}': {OWN_SECTIONS[name]} instead" for name in sections])
    # batches and their accumulation are ours: DeepSpeed is told when a step ends, and needs some number
    config.pop("train_batch_size", None)
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": options[OptimizerOptions].max_grad_norm, "zero_force_ds_cpu_optimizer": False}
    return plugin


class ZeroEngine(Engine):
    """DeepSpeed's engine of any stage."""

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype) -> None:
        super().__init__(accelerator)
        self.stage = int(cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config["zero_optimization"]["stage"])
        self.shares_base = self.stage == 3
        self.dtype = dtype
        if self.shares_base:
            _let_models_be_built()
        cast(Any, accelerator).autocast = self.autocast  # accelerate leaves precision to DeepSpeed: caches and previews would have none

    def autocast(self, *arguments: Any, **others: Any) -> AbstractContextManager[Any]:
        """What `Accelerator.autocast` is with other engines."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.accelerator.device.type, self.dtype)

    def refusals(self, arch: Architecture, options: OptionSet) -> Iterator[str]:
        """What changes weights behind DeepSpeed's back, or looks at more of them than a rank has."""
        values, precision, memory = options.values(), options[PrecisionOptions], options[MemoryOptions]
        kind = optimizer_class(options[OptimizerOptions].optimizer_type)
        if kind.__name__ not in ELEMENTWISE:
            yield f"--optimizer_type {kind.__name__}: DeepSpeed flattens the weights, which only {', '.join(ELEMENTWISE)} do not mind"
        if precision.mixed_precision == "fp16" or precision.full_bf16:
            given = "--full_bf16" if precision.full_bf16 else "--mixed_precision fp16"
            yield f"{given}: not with DeepSpeed; use --mixed_precision bf16 alone"
        if options[NetworkOptions].scale_weight_norms is not None:
            yield "--scale_weight_norms: DeepSpeed steps copies of the weights, and would undo it; leave it out"
        if values.get("nan_policy") == "skip":
            yield "--nan_policy skip: DeepSpeed cannot leave a step out; use stop"
        for name in ("save_state", "save_state_on_train_end", "save_state_every_n_steps", "resume", "ema_decay"):
            if values.get(name):
                yield f"--{name}: not with DeepSpeed; use FSDP (accelerate launch --use_fsdp --fsdp_version 2) instead"
        if self.stage == 3:
            if options[NetworkOptions].network_module not in network_modules():
                yield f"--network_module {options[NetworkOptions].network_module}: ZeRO stage 3 knows our networks only; use --zero_stage 2"
            if precision.storage is not None:
                yield f"{precision.storage_option}: ZeRO stage 3 shares out plain weights only; use --zero_stage 2"
            yield from needs_all_ranks(options, "ZeRO stage 3")
        for given, name in ((memory.blocks_to_swap, "blocks_to_swap"), (options[CompileOptions].compile, "compile")):
            if given:
                yield f"--{name}: not with DeepSpeed; leave one out"

    def data_refusals(self, data: TrainingData) -> Iterator[str]:
        """What needs the base of a rank that has only a part of it."""
        if self.stage == 3:
            yield from preserved_samples(data)
            if data.validation is not None:
                yield "--validation_split: not with ZeRO stage 3, where every pass needs all ranks; use --zero_stage 2, or FSDP"

    def prepare(self, arch: Architecture, model: TrainingModel, optimizer: Optimizer, *, is_placed: bool) -> tuple[nn.Module, Optimizer]:
        """Model and optimizer as DeepSpeed's, with our autocast around the forward pass."""
        cast(Any, model).forward = _within(self.autocast, model.forward)
        prepared, optimizer = self.accelerator.prepare(model, optimizer)
        if self.stage == 3:
            _tell_of_adapters(model.network)
        return prepared, optimizer

    def synchronised(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """DeepSpeed knows by `backward`."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor, *, is_last: bool) -> None:
        """The gradients of a loss; after the last one of a step they are shared out."""
        engine = cast(Any, model)
        engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        engine.backward(loss)

    def clip(self, model: nn.Module, parameters: Sequence[nn.Parameter], limit: float) -> float | None:
        """Nothing yet: `step` does."""
        return None

    def step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        """Clip and update; returns the norm before clipping, where DeepSpeed says it.

        Raises `ValueError` for a gradient that is not finite: it is known too late here, and the weights are spoilt.
        """
        engine = cast(Any, model)
        engine.step()
        norm = engine.get_global_grad_norm()
        if norm is not None and not math.isfinite(float(norm)):
            raise ValueError(f"the gradient became {float(norm)}, and DeepSpeed has applied it; the last file that was saved is sound")
        return None if norm is None else float(norm)

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Within it the network's weights are whole on this rank."""
        if self.stage < 3:
            yield
            return
        network = cast(TrainingModel, cast(Any, model).module).network
        with import_module("deepspeed").zero.GatheredParameters(list(network.parameters())):
            yield

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Refused: see `refusals`."""
        raise ValueError("DeepSpeed's states are not kept; use FSDP")


def _let_models_be_built() -> None:
    """Keep transformers from sharing out models while it builds them: ours are built empty, filled from files, then shared out."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _tell_of_adapters(network: nn.Module) -> None:
    """Let the weights of adapters be here when their layers compute: it is the layers' forward that uses them, not their own."""
    register = import_module("deepspeed").zero.register_external_parameter
    for adapter in network.modules():
        if isinstance(adapter, Adapter):
            for parameter in adapter.parameters():
                register(adapter.layer, parameter)


def _is_on(section: Any) -> bool:
    if isinstance(section, dict):
        return bool(section.get("enabled", True)) and section.get("enabled") != "auto"
    return section not in (None, "auto")


def _within(context: Callable[[], AbstractContextManager[Any]], call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with context():
            return call(*args, **kwargs).float()

    return forward
