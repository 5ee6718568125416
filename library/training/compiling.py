"""The denoiser's blocks, compiled one by one: `--compile` and what goes with it.

Only the forward of a block is compiled: checkpoints, the hooks of block swapping and everything between the blocks stay outside. A run
has a closed set of shapes (see `batch_shapes`), so after every shape was seen nothing is compiled again; what is, is said.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.core.command_line import OptionSet
from library.core.compiler import backend_problem, check_compiler
from library.core.log import get_logger
from library.core.options import OptionError, option
from library.core.rules import Rule
from library.data.dataset import TrainingData
from library.data.options import Size
from library.models.architecture import Architecture
from library.training.memory.options import MemoryOptions

logger = get_logger(__name__)

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # CUDA graphs read weights where they were when the graph was recorded
DYNAMIC = {None: None, "auto": None, "true": True, "false": False}
OTHER_PASSES = 8  # for a block: previews, and what torch finds worth a graph of its own
DETAILS = ("compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph", "compile_cache_size_limit")


@dataclass(kw_only=True, frozen=True)
class CompileOptions:
    """Compilation."""

    compile: bool = option(
        False,
        help="compile the denoiser's blocks: slower at first, for each size of picture, then faster",
        flags=("--compile", "--torch_compile"),
    )
    compile_backend: str = option("inductor", help="torch.compile's backend", flags=("--compile_backend", "--dynamo_backend"))
    compile_mode: Mode = option("default", help="what inductor optimises for")
    compile_dynamic: Literal["true", "false", "auto"] | None = option(
        None, help="one graph for all sizes (true), one for each (false), or as torch finds out (auto, and where absent)"
    )
    compile_fullgraph: bool = option(False, help="a block that does not compile as one graph is an error")
    compile_cache_size_limit: int | None = option(None, help="most graphs kept for one piece of code; counted from the data where absent")
    RULES: ClassVar[tuple[Rule, ...]] = (
        *(Rule(option=name, when=lambda v: not v["compile"], because="nothing is compiled without --compile") for name in DETAILS),
        Rule(
            option="compile_mode",
            when=lambda v: v["compile"] and v["compile_backend"] != "inductor",
            because="it is for --compile_backend inductor",
        ),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: an unknown backend, a limit below one."""
        if self.compile and (problem := backend_problem(self.compile_backend)) is not None:
            yield f"--compile_backend: {problem}"
        if self.compile_cache_size_limit is not None and self.compile_cache_size_limit < 1:
            yield f"--compile_cache_size_limit {self.compile_cache_size_limit}: must be at least 1"

    @property
    def arguments(self) -> dict[str, Any]:
        """What torch.compile is called with."""
        mode = {"mode": self.compile_mode} if self.compile_backend == "inductor" else {}
        return {"backend": self.compile_backend, "dynamic": DYNAMIC[self.compile_dynamic], "fullgraph": self.compile_fullgraph, **mode}


def refuse_compilation(arch: Architecture, options: OptionSet, device: torch.device) -> None:
    """Raise `OptionError` for what cannot be compiled here: before anything is loaded."""
    ours = options[CompileOptions]
    if not ours.compile:
        return
    if not arch.has_blocks:
        raise OptionError([f"--compile: {arch.title} has no row of blocks to compile; leave it out"])
    if options[MemoryOptions].blocks_to_swap and ours.compile_backend == "inductor" and ours.compile_mode in WITH_GRAPHS:
        reason = "its CUDA graphs cannot follow weights that are swapped"
        raise OptionError([f"--compile_mode {ours.compile_mode}: {reason}; use default, or no --blocks_to_swap"])
    check_compiler(device, ours.compile_backend)


def compile_blocks(arch: Architecture, denoiser: nn.Module, options: CompileOptions, data: TrainingData | None = None) -> "Watch | None":
    """Compile the forward of every block of the denoiser in place, and watch what is compiled again.

    `data` says how many graphs are kept: one for each block, each shape of a batch and each strength of the network, with gradients and
    without. To be called when the network is attached and checkpoints are set, before blocks are swapped.
    """
    if not options.compile:
        return None
    blocks = arch.blocks(denoiser)
    passes = OTHER_PASSES if data is None else 2 * len(batch_shapes(data)) * len(strengths(data)) + OTHER_PASSES
    limit = options.compile_cache_size_limit or passes * len(blocks)
    set_graph_limit(limit)
    for block in blocks:
        block.forward = torch.compile(block.forward, **options.arguments)
    logger.info(
        "%d blocks are compiled with %s, when they first see a size; at most %d graphs are kept",
        len(blocks),
        options.compile_backend,
        limit,
    )
    return Watch(denoiser)


def set_graph_limit(limit: int) -> None:
    """Let torch keep so many graphs of one piece of code, which all blocks of a kind share; beyond, it runs without compiling."""
    config: Any = torch._dynamo.config
    config.recompile_limit = limit
    config.accumulated_recompile_limit = max(limit, config.accumulated_recompile_limit)


def batch_shapes(data: TrainingData) -> set[tuple[int, Size]]:
    """Every number of samples and bucket that a pass of the run, or of its validation, can have. All epochs have the same batches.

    Of a batch in which some samples preserve what the base model predicts, any number of them is a pass of its own.
    """
    both = [data] if data.validation is None else [data, data.validation]
    whole = {(len(plan.samples), plan.bucket) for part in both for plan in part.order(0)}
    return {(count, bucket) for most, bucket in whole for count in range(1, most + 1)} if preserves(data) else whole


def strengths(data: TrainingData) -> set[float]:
    """Every strength at which the network acts in training: that of each dataset, 1 in validation, 0 where the base model is asked."""
    own = {1.0, *(dataset.options.network_multiplier for dataset in data.datasets)}
    return own | {0.0} if preserves(data) else own


def preserves(data: TrainingData) -> bool:
    """Is the target of some samples what the base model predicts?"""
    return any(image.preserves for image in data.images)


class Watch:
    """Says when torch compiles for a shape that it has compiled for before, and why.

    `recompiled` counts these. A change of the network's strength is none: there are few.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.recompiled = 0
        self._seen: set[Any] = set()
        self._graphs = 0
        self._reasons: dict[Any, int] = {}
        denoiser.register_forward_pre_hook(self._begins, with_kwargs=True)
        denoiser.register_forward_hook(self._ends, with_kwargs=True)

    def _begins(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._graphs = _graphs()
        self._reasons = {code: len(reasons) for code, reasons in torch._dynamo.utils.guard_failures.items()}

    def _ends(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kind = _kind((args, kwargs))
        count, self._graphs = _graphs() - self._graphs, _graphs()
        reasons = self._new_reasons()
        if count and kind in self._seen and not any("multiplier" in reason for reason in reasons):
            self.recompiled += count
            reason = reasons[-1].splitlines()[0] if reasons else "a graph of its own was needed"
            logger.warning("--compile: %d graphs were compiled again for a shape that was seen before: %s", count, reason)
        self._seen.add(kind)

    def _new_reasons(self) -> list[str]:
        """Why torch compiled in this pass: the guards that failed."""
        failures = torch._dynamo.utils.guard_failures.items()
        return [str(reason) for code, reasons in failures for reason in reasons[self._reasons.get(code, 0) :]]


def _graphs() -> int:
    """How many graphs torch has compiled in this process."""
    counters = cast(dict[str, Counter[str]], torch._dynamo.utils.counters)
    return counters["stats"]["unique_graphs"]


def _kind(given: Any) -> Any:
    """What a pass is known by: shapes, dtypes, and whether gradients and autocast are on."""
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    device = tensors[0].device.type
    modes = (torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.is_inference_mode_enabled())
    return (*((tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in tensors), *modes)
