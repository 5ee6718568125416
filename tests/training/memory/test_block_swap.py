"""Swapped blocks, emulated on a CPU: what is not visiting reads as NaN, and outputs and gradients are bit for bit the same."""

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from library.core.quantised import FormName, pack_layers
from library.models.anima.denoiser import AnimaDiT
from library.models.sdxl.outline import sdxl_outline
from library.models.sdxl.spec import ARCHITECTURE as SDXL
from library.training.memory import block_swap
from library.training.memory.block_swap import BlockSwap, Visitor, swap_refusal
from networks import lora

CPU = torch.device("cpu")
WIDTH = 6


class Block(nn.Module):
    """A residual block with a frozen weight, a bias and a buffer, and an adapter that is trained and belongs to nobody's parameters."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH, bias=False).to(torch.float64)
        self.register_buffer("scale", torch.tensor(1.5))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.adapter = [torch.randn(WIDTH, WIDTH, generator=generator).mul_(0.1).requires_grad_()]
        self.requires_grad_(False)

    def forward(self, stream: Tensor, text: Tensor) -> Tensor:
        hidden = self.outer(torch.tanh(self.inner(stream) * self.scale).double()).float()
        return stream + torch.tanh(hidden + stream @ self.adapter[0]) + text


class Row(nn.Module):
    """Blocks one after another, recomputed in the backward pass or not."""

    def __init__(self, is_checkpointed: bool = False, depth: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block(generator) for _ in range(depth))
        self.first = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        nn.init.eye_(self.first.weight)
        self.is_checkpointed = is_checkpointed

    def forward(self, stream: Tensor, text: Tensor) -> Tensor:
        stream = self.first(stream)
        for block in self.blocks:
            stream = checkpoint(block, stream, text, use_reentrant=False) if self.is_checkpointed else block(stream, text)
        return stream

    def trained(self) -> list[Tensor]:
        return [block.adapter[0] for block in self.blocks]  # pyright: ignore[reportIndexIssue]


class Visits:
    """How often each block came, and how many were there at the same time."""

    def __init__(self) -> None:
        self.here: list[int] = []
        self.most, self.count = 0, 0

    def came(self, visitor: Visitor) -> None:
        self.here.append(id(visitor))
        self.count += 1
        self.most = max(self.most, len(self.here))

    def left(self, visitor: Visitor) -> None:
        self.here.remove(id(visitor))


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Visits]:
    """Record the visits, and make memory that should be freed NaN instead, so that using it shows."""
    log = Visits()
    fetch, leave = Visitor.fetch, Visitor.leave

    def recorded_fetch(self: Visitor) -> None:
        if not self.is_here:
            log.came(self)
        fetch(self)

    def recorded_leave(self: Visitor) -> None:
        if self.is_here and id(self) in log.here:
            log.left(self)
        leave(self)

    monkeypatch.setattr(Visitor, "fetch", recorded_fetch)
    monkeypatch.setattr(Visitor, "leave", recorded_leave)
    monkeypatch.setattr(block_swap, "_free", lambda memory: memory.fill_(255))
    monkeypatch.setattr(block_swap, "_allocate", lambda memory, size: None)
    yield log


def inputs(seed: int = 0, requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, WIDTH, generator=generator).requires_grad_(requires_grad), torch.randn(3, WIDTH, generator=generator)


def step(model: Row, *runs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of one backward pass for all trained tensors and inputs."""
    outputs = [model(*run) for run in runs]
    leaves = [*model.trained(), *(stream for stream, _ in runs if stream.requires_grad)]
    return [*outputs, *torch.autograd.grad(torch.stack(outputs).square().sum(), leaves)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("asks", [True, False], ids=["input with gradient", "input without"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_swapped_blocks_give_the_same_outputs_and_gradients(count: int, asks: bool, is_checkpointed: bool, visits: Visits):
    expected = step(Row(is_checkpointed), inputs(requires_grad=asks))
    model = Row(is_checkpointed)
    BlockSwap(list(model.blocks), count, CPU)
    for _ in range(3):
        assert_equal(step(model, inputs(requires_grad=asks)), expected)


def test_a_block_that_is_recomputed_to_its_end_stays_for_its_gradients(visits: Visits):
    model = Row(is_checkpointed=True)
    BlockSwap(list(model.blocks), 4, CPU)
    with set_checkpoint_early_stop(False):
        assert_equal(step(model, inputs()), step(Row(), inputs()))


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_at_most_two_visit_and_none_stays(is_checkpointed: bool, visits: Visits):
    model = Row(is_checkpointed, depth=6)
    BlockSwap(list(model.blocks), 6, CPU)
    for _ in range(2):
        step(model, inputs(requires_grad=False))
        assert visits.here == []
    assert visits.most == 2


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_step_fetches_each_block_twice_but_the_last_once(is_checkpointed: bool, visits: Visits):
    model = Row(is_checkpointed)
    BlockSwap(list(model.blocks), 3, CPU)
    step(model, inputs())
    assert visits.count == 2 * 3 - 1


def test_without_gradients_no_block_stays(visits: Visits):
    model = Row()
    BlockSwap(list(model.blocks), 4, CPU)
    with torch.no_grad():
        assert torch.equal(model(*inputs()), Row()(*inputs()))
    assert visits.here == [] and visits.count == 4


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_two_forwards_before_one_backward_pass(is_checkpointed: bool, visits: Visits):
    runs = inputs(1), inputs(2)
    model = Row(is_checkpointed)
    BlockSwap(list(model.blocks), 3, CPU)
    assert_equal(step(model, *runs), step(Row(is_checkpointed), *runs))


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_pass_without_gradients_before_the_one_with_them(is_checkpointed: bool, visits: Visits):
    """As where the base model gives the target (`diff_output_preservation`)."""
    model = Row(is_checkpointed)
    BlockSwap(list(model.blocks), 3, CPU)
    with torch.no_grad():
        base = model(*inputs(1))
    assert torch.equal(base, Row()(*inputs(1)))
    assert_equal(step(model, inputs()), step(Row(is_checkpointed), inputs()))


def test_a_forward_whose_backward_pass_never_comes_does_no_harm(visits: Visits):
    model = Row()
    BlockSwap(list(model.blocks), 3, CPU)
    model(*inputs(1))
    assert_equal(step(model, inputs()), step(Row(), inputs()))


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_freed_memory_is_really_given_back(is_checkpointed: bool):
    model = Row(is_checkpointed)
    swap = BlockSwap(list(model.blocks), 3, CPU)
    assert_equal(step(model, inputs()), step(Row(is_checkpointed), inputs()))
    assert all(visitor.away.untyped_storage().nbytes() == 0 < visitor.size for visitor in swap.visitors)


def test_blocks_at_home_can_be_saved(visits: Visits):
    model = Row()
    BlockSwap(list(model.blocks), 4, CPU)
    step(model, inputs())
    found, expected = model.state_dict(), Row().state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)


def test_removing_it_leaves_plain_blocks(visits: Visits):
    model = Row()
    swap = BlockSwap(list(model.blocks), 4, CPU)
    swap.remove()
    assert_equal(step(model, inputs()), step(Row(), inputs()))
    assert visits.count == 0


def test_the_rest_of_a_model_moves_to_the_device(monkeypatch: pytest.MonkeyPatch):
    model = Row()
    swap = BlockSwap(list(model.blocks), 3, CPU)
    monkeypatch.setattr(block_swap, "_moved", lambda tensor, device: torch.zeros_like(tensor))
    swap.place(model)
    moved = {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if not tensor.any()}
    assert moved == {"first.weight", *(f"blocks.0.{name}" for name in ("inner.weight", "inner.bias", "outer.weight", "scale"))}


@pytest.mark.parametrize("count", [-1, 5])
def test_a_count_that_is_not_there_is_refused(count: int):
    with pytest.raises(ValueError, match=f"--blocks_to_swap {count}: the model has 4 blocks; give a number from 0 to 4"):
        BlockSwap(list(Row().blocks), count, CPU)


def test_blocks_that_are_trained_are_refused():
    model = Row()
    model.blocks[3].requires_grad_(True)
    with pytest.raises(ValueError, match="--blocks_to_swap: block 3 holds weights that are trained"):
        BlockSwap(list(model.blocks), 2, CPU)


def test_only_devices_with_memory_of_their_own_swap():
    assert swap_refusal(torch.device("cuda")) is None
    assert "has no memory of its own" in (swap_refusal(CPU) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_on_a_gpu_swapped_blocks_train_alike_and_take_less_of_its_memory(is_checkpointed: bool):
    device = torch.device("cuda")
    model = Row(is_checkpointed).to(device)
    for block in model.blocks:
        block.adapter[0] = block.adapter[0].detach().to(device).requires_grad_()  # pyright: ignore[reportIndexIssue, reportCallIssue]
    run = inputs(requires_grad=False)[0].to(device), inputs()[1].to(device)
    expected, before = step(model, run), torch.cuda.memory_allocated()
    BlockSwap(list(model.blocks), 4, device)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < before
    for _ in range(3):
        assert_equal(step(model, run), expected)


# Anima


def _anima(modules: SimpleNamespace, is_checkpointed: bool, form: FormName | None = None) -> tuple[AnimaDiT, Any]:
    """A small Anima with an attached network on all its layers, and the network; in bf16 and packed where a form is given."""
    denoiser = AnimaDiT(**copy.deepcopy(dict(modules.denoiser.items())))
    if form is not None:
        assert pack_layers(denoiser.to(torch.bfloat16), form, smallest=1) > 0
    network = lora.create_network(1.0, 2, 1.0, None, [], denoiser, include_patterns="['.*']")
    adapters: Any = network.adapters
    for adapter in adapters:
        nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    network.attach()
    if is_checkpointed:
        denoiser.enable_gradient_checkpointing()
    return denoiser, network


def _anima_step(denoiser: AnimaDiT, network: Any, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents, conditioning = torch.randn(1, 16, 4, 4, generator=generator), torch.randn(1, 5, 24, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        velocity = denoiser(latents, torch.tensor([0.3]), conditioning)
    used = [parameter for adapter in network.adapters if "llm_adapter" not in adapter.name for parameter in adapter.parameters()]
    return [velocity, *torch.autograd.grad(velocity.square().sum(), used)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_anima_trains_alike_with_its_blocks_swapped(
    is_checkpointed: bool, dtype: torch.dtype, small_anima_modules: SimpleNamespace, visits: Visits
):
    denoiser, network = _anima(small_anima_modules, is_checkpointed)
    denoiser.to(dtype)
    expected = _anima_step(denoiser, network, dtype)
    BlockSwap(denoiser.blocks(), 2, CPU)
    for _ in range(2):
        assert_equal(_anima_step(denoiser, network, dtype), expected)
    assert visits.count > 0 and visits.here == []


@pytest.mark.parametrize("form", get_args(FormName))
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_blocks_whose_weights_are_packed_swap_too(
    is_checkpointed: bool, form: FormName, small_anima_modules: SimpleNamespace, visits: Visits
):
    denoiser, network = _anima(small_anima_modules, is_checkpointed, form)
    expected = _anima_step(denoiser, network, torch.bfloat16)
    BlockSwap(denoiser.blocks(), 2, CPU)
    for _ in range(2):
        assert_equal(_anima_step(denoiser, network, torch.bfloat16), expected)
    assert visits.count > 0 and visits.here == []


# SDXL


def _unet(modules: SimpleNamespace, is_checkpointed: bool) -> tuple[Any, Any]:
    """A small U-Net with an attached network on all its layers, and the network."""
    unet = copy.deepcopy(modules.unet)
    network = lora.create_network(1.0, 2, 1.0, None, [], unet, conv_dim="2", conv_alpha="1")
    adapters: Any = network.adapters
    for adapter in adapters:
        nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    network.attach()
    if is_checkpointed:
        unet.enable_gradient_checkpointing()
    return unet, network


def _unet_step(unet: Any, network: Any, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 192, generator=generator)
    conditions = {"text_embeds": torch.randn(1, 128, generator=generator), "time_ids": torch.full((1, 6), 64)}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        guess = unet(latents, torch.tensor([300]), encoder_hidden_states=text, added_cond_kwargs=conditions).sample
    return [guess, *torch.autograd.grad(guess.square().sum(), list(network.parameters()), allow_unused=True)]


def test_the_blocks_of_a_unet_run_in_their_order_once_a_pass(small_sdxl_modules: SimpleNamespace):
    unet, _ = _unet(small_sdxl_modules, is_checkpointed=False)
    blocks, order = SDXL.blocks(unet), list[int]()
    for n, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, n=n: order.append(n))
    with torch.no_grad():
        _ = unet(
            torch.zeros(1, 4, 8, 8), torch.tensor([3]), encoder_hidden_states=torch.zeros(1, 5, 192),
            added_cond_kwargs={"text_embeds": torch.zeros(1, 128), "time_ids": torch.full((1, 6), 64)},
        )  # fmt: skip
    assert order == list(range(len(blocks)))


def test_the_blocks_of_a_unet_hold_nearly_all_its_weights():
    unet, *_ = sdxl_outline()
    inside, whole = (sum(parameter.numel() for module in some for parameter in module.parameters()) for some in (SDXL.blocks(unet), [unet]))
    assert inside > 0.97 * whole and len(SDXL.blocks(unet)) == 87


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("count", [4, None], ids=["some", "all"])
def test_a_unet_trains_alike_with_its_blocks_swapped(
    count: int | None, is_checkpointed: bool, dtype: torch.dtype, small_sdxl_modules: SimpleNamespace, visits: Visits
):
    unet, network = _unet(small_sdxl_modules, is_checkpointed)
    unet.to(dtype)
    expected = _unet_step(unet, network, dtype)
    assert sum(gradient is not None for gradient in expected) > 100
    blocks = SDXL.blocks(unet)
    BlockSwap(blocks, len(blocks) if count is None else count, CPU)
    for _ in range(2):
        for found, wanted in zip(_unet_step(unet, network, dtype), expected, strict=True):
            assert found is wanted or torch.equal(found, wanted)
    assert visits.most == 2 and visits.here == []
