"""What checkpoints keep, in main memory; a CPU stands for the GPU, so that copies are plain."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.training.memory.offload import Offload, Parked

WIDTH, DEPTH = 5, 4
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block that takes a text beside its stream."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))

    def forward(self, stream: Tensor, text: Tensor) -> Tensor:
        return stream + torch.dropout(torch.tanh(stream @ self.weight), 0.5, train=True) * text


def blocks() -> list[Block]:
    generator = torch.Generator().manual_seed(0)
    return [Block(generator) for _ in range(DEPTH)]


def gradients(offload: Offload | None, runs: int = 1) -> list[Tensor]:
    """The gradients of the blocks, the stream and the text, of some passes and one backward pass for all."""
    torch.manual_seed(1)
    row, stream, text = blocks(), torch.randn(3, WIDTH).requires_grad_(), torch.randn(3, WIDTH).requires_grad_()
    outputs = []
    for _ in range(runs):
        x = stream * 1
        for block in row:
            x = block(x, text) if offload is None else offload(block, x, text)
        outputs.append(x.square().sum())
    return list(torch.autograd.grad(torch.stack(outputs).sum(), [*(block.weight for block in row), stream, text]))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to parked tensors, by the order in which they were parked."""
    log: list[str] = []
    known: list[Parked] = []
    start, fetch, take = Parked.__init__, Parked.fetch, Parked.take

    def began(self: Parked, *args: object) -> None:
        known.append(self)
        log.append(f"park {len(known) - 1}")
        start(self, *args)  # pyright: ignore[reportArgumentType]

    def fetched(self: Parked) -> None:
        if self._back is None:
            log.append(f"fetch {known.index(self)}")
        fetch(self)

    def taken(self: Parked) -> Tensor:
        result = take(self)
        log.append(f"take {known.index(self)}")
        return result

    monkeypatch.setattr(Parked, "__init__", began)
    monkeypatch.setattr(Parked, "fetch", fetched)
    monkeypatch.setattr(Parked, "take", taken)
    return log


@pytest.mark.parametrize("runs", [1, 2])
def test_gradients_are_bit_for_bit_the_same(runs: int) -> None:
    for found, expected in zip(gradients(Offload(CPU), runs), gradients(None, runs), strict=True):
        assert torch.equal(found, expected)


def test_only_the_stream_is_parked_once_a_block(events: list[str]) -> None:
    gradients(Offload(CPU))
    assert [event for event in events if event.startswith("park")] == [f"park {n}" for n in range(DEPTH)]


def test_each_comes_back_while_the_one_after_it_computes(events: list[str]) -> None:
    gradients(Offload(CPU))
    back = [event for event in events if not event.startswith("park")]
    assert back == ["fetch 3", "fetch 2", "take 3", "fetch 1", "take 2", "fetch 0", "take 1", "take 0"]


def test_nothing_stays_after_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    offload = Offload(CPU)
    gradients(offload)
    gc.collect()
    assert offload._latest is not None and offload._latest() is None


def test_without_gradients_nothing_is_parked(events: list[str]) -> None:
    block, offload = blocks()[0], Offload(CPU)
    with torch.no_grad():
        offload(block, torch.randn(3, WIDTH), torch.randn(3, WIDTH))
    assert events == []


def test_what_is_parked_leaves_its_memory_free() -> None:
    """Nothing but the parked copy holds a block's input between the passes."""
    offload, row = Offload(CPU), blocks()
    x = torch.randn(3, WIDTH).requires_grad_() * 1
    text = torch.randn(3, WIDTH)
    middle = offload(row[0], x, text)
    freed: list[bool] = []
    last = offload(row[1], middle, text)
    weakref.finalize(middle.untyped_storage(), freed.append, True)
    del middle
    gc.collect()
    assert freed == [True] and torch.isfinite(torch.autograd.grad(last.sum(), [row[0].weight])[0]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_inputs_leave_its_memory() -> None:
    device, size = torch.device("cuda"), 2**20
    weights = [torch.full((size,), 0.5, device=device).requires_grad_() for _ in range(6)]

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return x + torch.tanh(x * weight)

    def run(call: Offload | None) -> tuple[int, list[Tensor]]:
        x = torch.ones(size, device=device).requires_grad_() * 1
        for weight in weights:
            x = checkpoint(block, x, weight, use_reentrant=False) if call is None else call(block, x, weight)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        return held, list(torch.autograd.grad(x.square().sum(), weights))

    plain, expected = run(None)
    offloaded, found = run(Offload(device))
    assert offloaded < plain - 3 * 4 * size
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
