"""FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`): every rank holds a share of the frozen base, and all of the network.

The base is what takes memory, and it does not change: torch's `fully_shard` splits it, a group of weights for each block of the denoiser
and one for the rest, which stays together from its forward pass to the end of the backward pass. A block's weights are gathered before
it computes and let go after it. The network is small. Every rank keeps it whole, and gradients are averaged once a step: so all
optimizers, saving, and resuming work as they do on one GPU. Text encoders are whole on every rank too.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast, parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.data.dataset import TrainingData
from library.models.architecture import Architecture
from library.training.compiling import CompileOptions
from library.training.memory.options import MemoryOptions
from library.training.model import TrainingModel
from library.training.parallel.engine import Engine
from library.training.parallel.refusals import preserved_samples
from library.training.precision import PrecisionOptions

logger = get_logger(__name__)


def is_asked() -> bool:
    """Whether accelerate was launched for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


class ShardedEngine(Engine):
    """The base shared out by FSDP2, the network whole on every rank."""

    shares_base = True
    loads_on_cpu = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        plugin = getattr(accelerator.state, "fsdp_plugin", None)  # accelerate makes none on a CPU
        self.plugin: Any = FullyShardedDataParallelPlugin() if plugin is None else plugin
        self._groups: list[Any] = []

    def refusals(self, arch: Architecture, options: OptionSet) -> Iterator[str]:
        """FSDP's first version, and all that moves or replaces the base's weights by itself."""
        precision, memory = options[PrecisionOptions], options[MemoryOptions]
        if self.plugin.fsdp_version != 2:
            yield "FSDP: only its second version is used here; launch with --fsdp_version 2"
        if self.plugin.activation_checkpointing:
            yield "FSDP: give --gradient_checkpointing to the script, not --fsdp_activation_checkpointing to accelerate"
        if precision.storage is not None:
            yield f"{precision.storage_option}: FSDP shares out plain weights only; leave one out"
        if memory.blocks_to_swap:
            yield f"--blocks_to_swap {memory.blocks_to_swap}: FSDP moves the blocks itself; use --fsdp_offload_params true of accelerate"
        if options[CompileOptions].compile:
            yield "--compile: not with FSDP; leave one out"

    def data_refusals(self, data: TrainingData) -> Iterator[str]:
        """Preserved samples: their pass through the base is made on the ranks that have some, and would wait for the others."""
        yield from preserved_samples(data)

    def prepare(self, arch: Architecture, model: TrainingModel, optimizer: Optimizer, *, is_placed: bool) -> tuple[nn.Module, Optimizer]:
        """Place the network and the text encoders, and share out the denoiser."""
        assert not is_placed, "block swapping was refused"
        device = self.accelerator.device
        for part in (model.network, model.text_encoders):
            part.to(device)  # parameters stay the same objects, which the optimizer holds
        spread_from_first(list(model.network.parameters()))
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast, and no wrapper
        self._share_out(prepared, arch.blocks(model.denoiser))
        return prepared, cast(Optimizer, self.accelerator.prepare_optimizer(optimizer, device_placement=True))

    def synchronised(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Nothing goes from rank to rank in the backward pass but frozen weights."""
        return nullcontext()

    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the network's gradients over the ranks."""
        average_gradients(parameters, self.accelerator)

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Within it all weights are here."""
        root = cast(Any, model)._get_fsdp_state()
        root._lazy_init()  # its first forward would; blocks that are called alone must not before
        blocks = self._groups[1:]  # after the root
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
        for group in self._groups:
            group.unshard()
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(self.plugin.reshard_after_forward, recurse=False)
            for group in self._groups:
                group.reshard()
            _forget_passes(root)

    def _share_out(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        own = cast(TrainingModel, model)
        whole = {parameter for part in (own.network, own.text_encoders) for parameter in part.parameters()}
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        settings: dict[str, Any] = {"mesh": mesh, "offload_policy": self.plugin.cpu_offload}
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.plugin.reshard_after_forward, **settings)
        fully_shard(model, ignored_params=whole, **settings)
        self._groups = [model, *blocks]
        logger.info("FSDP2: the denoiser's %d blocks are shared out among %d processes", len(blocks), self.accelerator.num_processes)


def spread_from_first(parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the values of the first, as DDP does: a third-party network may have drawn others on each."""
    for parameter in parameters:
        broadcast(parameter.data)


def _forget_passes(root: Any) -> None:
    """Let FSDP forget in which order blocks ran: it gathers them in the reverse order in the next backward pass, the same on all ranks."""
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    for state in root._state_ctx.all_states:
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:  # the second before torch 2.12
            if group is not None:
                group._post_forward_indices.clear()


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every rank the mean of all ranks' gradients, summed in float32 or better. What no rank has a gradient of gets none."""
    if accelerator.num_processes == 1:
        return
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32, device=accelerator.device)
    anywhere = cast(Tensor, accelerator.reduce(has, "sum")).tolist()
    shared = [parameter for parameter, count in zip(parameters, anywhere, strict=True) if count]
    if not shared:
        return
    flat = torch.cat([_gradient(parameter).flatten() for parameter in shared])
    mean = cast(Tensor, accelerator.reduce(flat, "sum")) / accelerator.num_processes
    for parameter, part in zip(shared, mean.split([parameter.numel() for parameter in shared]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide) if parameter.grad is None else parameter.grad.to(wide)
