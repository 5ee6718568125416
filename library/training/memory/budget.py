"""The least recomputation with which the denoiser's activations fit: `--activation_memory_budget`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from library.core.options import OptionError
from library.data.batch import Batch, Sizes, TextStates
from library.data.dataset import TrainingData
from library.models.architecture import Tokens
from library.training.memory.activations import BlockBytes, fakes, saved_bytes
from library.training.model import TrainingModel

STEPS = 8192  # parts of the budget in which the search counts; sizes are rounded up to them


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What one step keeps for the backward pass, in bytes: each block of the denoiser, and all that is between the blocks."""

    blocks: Sequence[BlockBytes]
    between: int

    @property
    def unbounded(self) -> int:
        """Bytes where nothing is computed twice."""
        return self.between + sum(block.given + block.kept for block in self.blocks)

    def peak(self, twice: set[int], *, offloads: bool = False) -> int:
        """The most bytes at once where the blocks of these numbers are computed twice, in the backward pass one after the other."""
        held, peak = self.between, 0
        for n, block in enumerate(self.blocks):
            whole = block.given + block.kept
            peak = max(peak, held + whole)
            held += whole if n not in twice else 0 if offloads else block.given
        return peak

    def repeated(self, twice: set[int]) -> float:
        """The share of the blocks' operations that is done twice."""
        total = sum(block.operations for block in self.blocks)
        return sum(self.blocks[n].operations for n in twice) / total if total else 0.0


@dataclass(frozen=True)
class _Choice:
    """The blocks computed twice among those looked at so far, newest first, and what that costs."""

    operations: int = 0
    block: int = -1
    earlier: "_Choice | None" = None

    def numbers(self) -> set[int]:
        """The numbers of the blocks."""
        found, choice = set(), self
        while choice.earlier is not None:
            found.add(choice.block)
            choice = choice.earlier
        return found


def blocks_to_repeat(activations: Activations, budget: int, *, offloads: bool = False) -> set[int]:
    """The numbers of the blocks to compute twice, with the fewest operations, so that the peak is within `budget` bytes.

    A knapsack over the blocks in their order: at each block's turn in the backward pass, what the blocks before it hold and all of its
    own must fit. With `offloads`, a block that is computed twice holds nothing on the device. Raises `OptionError` where nothing fits.
    """
    unit = max(1, budget // STEPS)
    states: dict[int, _Choice] = {-(-activations.between // unit): _Choice()}
    for n, block in enumerate(activations.blocks):
        whole, rest = (-(-size // unit) for size in (block.given + block.kept, 0 if offloads else block.given))
        reached: dict[int, _Choice] = {}
        for held, choice in states.items():
            if (held + whole) * unit <= budget:
                _offer(reached, held + whole, choice)
                _offer(reached, held + rest, _Choice(choice.operations + block.operations, n, choice))
        states = _undominated(reached)
    if not states:
        least = activations.peak(set(range(len(activations.blocks))), offloads=offloads)
        raise OptionError([
            f"--activation_memory_budget: {in_words(budget)} cannot hold the activations: {in_words(least)} remain where every block "
            f"is computed twice ({in_words(activations.unbounded)} where none is); give a little more than that, or smaller batches"
        ])  # fmt: skip
    return min(states.values(), key=lambda choice: choice.operations).numbers()


def widest_activations(
    model: TrainingModel, data: TrainingData, tokenizers: Sequence[Any], model_options: Any, precision: torch.dtype
) -> Activations:
    """The activations of a pass of the model over the widest batch of the data; see `activations_of`."""
    batch = widest_batch(data)
    return activations_of(model, batch, batch.text or model.arch.tokenize(tokenizers, batch.captions, model_options), precision)


def activations_of(model: TrainingModel, batch: Batch, given_text: TextStates | Tokens, precision: torch.dtype) -> Activations:
    """The activations of a pass of the model, with the network attached, over a batch and its text; nothing is computed.

    `given_text` holds text states, or token ids for the model's own text encoders.
    """
    blocks = model.arch.blocks(model.denoiser)
    with fakes(precision=precision), on_paper(model):
        noisy, times = torch.empty(_latent_shape(model, batch)), torch.empty(len(batch.images))
        text = {name: torch.empty_like(tensor, device="cpu") for name, tensor in given_text.items()}
        sizes = Sizes(**{name: torch.empty_like(pair, device="cpu") for name, pair in vars(batch.sizes).items()})

        def run() -> Tensor:
            return model(noisy, times, text, sizes)

        return Activations(blocks=saved_bytes(model, blocks, run), between=_Between(model).bytes(blocks, run))


def widest_batch(data: TrainingData) -> Batch:
    """The batch of the first epoch with the most pixels."""
    plans = data.order(0)
    position = max(range(len(plans)), key=lambda n: plans[n].bucket[0] * plans[n].bucket[1] * len(plans[n].samples))
    return data.batch(0, position)


@contextmanager
def on_paper(model: nn.Module) -> Iterator[None]:
    """Within `library.training.memory.activations.fakes`: let a model's weights be shapes on the CPU, wherever they really are."""
    owners = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    real = [(table, name, tensor) for table in owners for name, tensor in table.items() if tensor is not None]
    drawn: dict[int, Tensor] = {}
    try:
        for table, name, tensor in real:
            if id(tensor) not in drawn:
                drawn[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    drawn[id(tensor)] = nn.Parameter(drawn[id(tensor)], requires_grad=tensor.requires_grad)
            cast(dict[str, Tensor], table)[name] = drawn[id(tensor)]
        yield
    finally:
        for table, name, tensor in real:
            cast(dict[str, Tensor], table)[name] = tensor


def in_words(size: int) -> str:
    """A number of bytes as users read it: `1.25 GB` of 2^30 bytes, `37.5 MB` of 2^20."""
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"


def _latent_shape(model: TrainingModel, batch: Batch) -> tuple[int, ...]:
    if batch.latents is not None:
        return tuple(batch.latents.shape)
    assert batch.pixels is not None
    height, width = (side // model.arch.pixels_per_latent for side in batch.pixels.shape[2:])
    return (len(batch.pixels), model.arch.latent_channels, height, width)


def _offer(states: dict[int, _Choice], held: int, choice: _Choice) -> None:
    if held not in states or choice.operations < states[held].operations:
        states[held] = choice


def _undominated(states: dict[int, _Choice]) -> dict[int, _Choice]:
    """Without the states that hold more than another and cost as much or more."""
    kept: dict[int, _Choice] = {}
    fewest: int | None = None
    for held, choice in sorted(states.items(), key=lambda state: state[0]):
        if fewest is None or choice.operations < fewest:
            kept[held], fewest = choice, choice.operations
    return kept


class _Between:
    """Adds up what autograd keeps of what happens outside of some blocks: not their inputs, and nothing that they keep too."""

    def __init__(self, model: nn.Module) -> None:
        self.total, self._is_inside = 0, False
        self._seen = {storage._cdata: storage for storage in map(_storage, (*model.parameters(), *model.buffers()))}

    def bytes(self, blocks: Sequence[nn.Module], run: Callable[[], object]) -> int:
        """The sum over one pass that `run` makes."""
        handles = [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in blocks]
        handles += [block.register_forward_hook(self._leave) for block in blocks]
        try:
            with saved_tensors_hooks(self._keep, lambda tensor: tensor):
                run()
        finally:
            for handle in handles:
                handle.remove()
        return self.total

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._is_inside = True
        self._seen |= {_storage(leaf)._cdata: _storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._is_inside = False

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += 0 if self._is_inside else storage.nbytes()
        return tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
