"""The least recomputation that fits: against all choices, and what is measured against what autograd really keeps."""

import re
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_family import SmallFamily
from torch import Tensor, nn
from toy_step import ToyFamily

from library.core.options import OptionError
from library.data.batch import Batch, Sizes
from library.training.memory.activations import BlockBytes
from library.training.memory.budget import Activations, activations_of, blocks_to_repeat
from library.training.memory.checkpointing import set_checkpointing
from library.training.memory.options import Budget, MemoryOptions
from library.training.model import TrainingModel

GB, MB = 2**30, 2**20
CPU = torch.device("cpu")
BLOCKS = st.lists(
    st.builds(BlockBytes, kept=st.integers(0, 40), given=st.integers(0, 9), operations=st.integers(1, 50)), min_size=1, max_size=7
)


@given(blocks=BLOCKS, between=st.integers(0, 9), budget=st.integers(1, 150), offloads=st.booleans())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_no_other_choice_that_fits_has_fewer_operations(blocks: list[BlockBytes], between: int, budget: int, offloads: bool) -> None:
    activations = Activations(blocks=blocks, between=between)
    numbers = range(len(blocks))
    every = [set(some) for some in chain.from_iterable(combinations(numbers, count) for count in range(len(blocks) + 1))]
    fitting = [some for some in every if activations.peak(some, offloads=offloads) <= budget]
    if not fitting:
        with pytest.raises(OptionError, match="--activation_memory_budget"):
            blocks_to_repeat(activations, budget, offloads=offloads)
        return
    chosen = blocks_to_repeat(activations, budget, offloads=offloads)
    assert activations.peak(chosen, offloads=offloads) <= budget
    assert activations.repeated(chosen) == pytest.approx(min(map(activations.repeated, fitting)))


def test_a_budget_of_everything_repeats_nothing() -> None:
    activations = Activations(blocks=[BlockBytes(kept=400 * MB, given=30 * MB, operations=5)] * 28, between=GB)
    assert blocks_to_repeat(activations, activations.unbounded * 101 // 100) == set()


def test_large_models_of_many_blocks_are_chosen_within_the_budget() -> None:
    blocks = [BlockBytes(kept=(90 + 7 * (n % 5)) * MB, given=2 * MB, operations=50 + n % 3) for n in range(87)]
    activations = Activations(blocks=blocks, between=200 * MB)
    for share in (0.9, 0.5, 0.1):
        budget = int(share * activations.unbounded)
        assert 0.97 * budget < activations.peak(blocks_to_repeat(activations, budget)) <= budget


def test_the_peak_is_that_of_each_block_s_turn_in_the_backward_pass() -> None:
    blocks = [
        BlockBytes(kept=10, given=1, operations=1),
        BlockBytes(kept=20, given=2, operations=1),
        BlockBytes(kept=5, given=3, operations=1),
    ]
    activations = Activations(blocks=blocks, between=100)
    assert activations.peak(set()) == activations.unbounded == 141
    assert activations.peak({0, 1, 2}) == 100 + 1 + 22  # the second block, while the first one's input waits
    assert activations.peak({0, 1, 2}, offloads=True) == 100 + 22
    assert activations.peak({1}) == 100 + 11 + 22


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GB", 6 * GB), ("6", 6 * GB), ("1.5 gib", GB * 3 // 2), ("600MB", 600 * MB), ("50%", 500), ("100%", 1000)],
)
def test_a_budget_is_read(text: str, expected: int) -> None:
    assert Budget.parse(text).within(1000) == expected


@pytest.mark.parametrize("text", ["", "much", "-6GB", "0", "6TB", "120%", "6 GB please"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    assert list(MemoryOptions(activation_memory_budget=text).check()) != []


# What is measured


class Block(nn.Module):
    """Keeps two tensors of the stream's size: what tanh and the square give or were given."""

    def forward(self, stream: Tensor) -> Tensor:
        return stream + torch.tanh(stream).square()


class Chain(nn.Module):
    """A frozen scale, and blocks."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = block(x)
        return x.square()  # keeps its input, outside of the blocks


class ChainFamily(ToyFamily):
    """Gives the chain its latents."""

    latent_channels, pixels_per_latent = 4, 8

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: object, sizes: Sizes) -> Tensor:
        return denoiser(noisy)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(denoiser.blocks)  # pyright: ignore[reportArgumentType]


def batch_of(shape: tuple[int, ...]) -> Batch:
    pair = torch.zeros(shape[0], 2, dtype=torch.int64)
    sizes = Sizes(original=pair, crop=pair, target=pair)
    names = [""] * shape[0]
    return Batch(images=names, captions=names, sizes=sizes, loss_weights=torch.ones(shape[0]), latents=torch.zeros(shape))


def test_what_is_measured_is_what_autograd_keeps() -> None:
    chain_of_three, shape = Chain(3), (2, 4, 8, 8)
    model = TrainingModel(ChainFamily(), chain_of_three, [], nn.Identity(), trains_text_encoders=False)  # pyright: ignore[reportArgumentType]
    found = activations_of(model, batch_of(shape), {"states": torch.zeros(2, 1)}, torch.float32)
    size = 4 * 2 * 4 * 8 * 8
    assert [block.kept for block in found.blocks] == [size] * 3  # of tanh; its input is what the block was given
    assert [block.given for block in found.blocks] == [size] * 3
    assert found.between == 2 * size  # the latents, for the scale's gradient, and the last square's input
    assert chain_of_three.scale.device == CPU and type(chain_of_three.scale.data) is Tensor


# Every family's run


@pytest.mark.slow
def test_a_budget_changes_no_loss_and_repeats_some_blocks(
    family: SmallFamily, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--max_train_steps", "2", "--network_train_unet_only"]
    plain = family.run(images, tmp_path / "a", *given).losses
    capsys.readouterr()
    bounded = family.run(images, tmp_path / "b", *given, "--activation_memory_budget", "75%").losses
    said = re.search(r"(\d+) of (\d+) blocks are computed twice", capsys.readouterr().err)
    assert said is not None and 0 < int(said[1]) < int(said[2])
    assert bounded == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_a_budget_that_nothing_meets_is_refused_with_what_is_needed(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="remain where every block is computed twice"):
        family.run(images, tmp_path, "--max_train_steps", "1", "--activation_memory_budget", "0.001MB")


def test_only_the_chosen_blocks_run_twice() -> None:
    """The first of two equal blocks would save as much as the second one, whose turn comes first: it is the first that is chosen."""
    calls: list[SimpleNamespace] = []

    class Denoiser(nn.Module):
        def enable_gradient_checkpointing(self, call: object) -> None:
            calls.append(SimpleNamespace(call=call))

    family, denoiser = ChainFamily(), Denoiser()
    denoiser.blocks = nn.ModuleList([Block(), Block()])
    model = TrainingModel(family, denoiser, [], nn.Identity(), trains_text_encoders=False)  # pyright: ignore[reportArgumentType]
    found = Activations(blocks=[BlockBytes(kept=10 * MB, given=MB, operations=1)] * 2, between=0)
    set_checkpointing(model, MemoryOptions(activation_memory_budget="13MB"), CPU, lambda: found)
    runs: list[int] = []
    for n, block in enumerate(denoiser.blocks):
        block.register_forward_pre_hook(lambda *_, n=n: runs.append(n))
    x = torch.ones(3, requires_grad=True)
    for block in denoiser.blocks:
        x = calls[0].call(block, x)
    x.sum().backward()
    assert runs == [0, 1, 0]
