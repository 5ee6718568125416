"""Layers with adapters under torch.compile: one graph, the values of eager mode, and no more graphs than there are ways."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_cases import BLOCKS, MODULES, WHOLE, adapted, counting, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from networks.kernels import products
from networks.network import Network

DROPOUTS = {"neuron_dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.2}
SIZES = ((4, 6), (2, 2), (8, 10), (2, 6), (12, 8), (16, 14), (20, 18))  # heights and widths of latents
CHANGES: dict[str, Callable[[Network], None]] = {
    "attached": lambda network: None,
    "half": lambda network: network.set_multiplier(0.5),
    "off": lambda network: network.set_enabled(False),
    "on": lambda network: network.set_enabled(True),
    "detached": lambda network: network.detach(),
}


@dataclass(frozen=True)
class Precision:
    """Autocast or not, as a machine with half precision computes it or as one without."""

    is_autocast: bool = False
    is_emulated: bool = False
    tolerance: float = 1e-5


PRECISIONS = {"float32": Precision(), "autocast": Precision(True, False, 2e-2), "emulated autocast": Precision(True, True, 2e-2)}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.fixture
def modules(small_sdxl_modules: SimpleNamespace, small_anima_modules: SimpleNamespace) -> tuple[SimpleNamespace, SimpleNamespace]:
    return small_sdxl_modules, small_anima_modules


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert float((one.double() - other.double()).norm()) <= tolerance * float(other.double().norm()) + 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dropouts"),
    [*((precision, {}) for precision in PRECISIONS), ("float32", DROPOUTS)],
    ids=[*PRECISIONS, "float32-dropouts"],
)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("algorithm", MODULES)
def test_a_block_is_one_graph_with_the_values_of_eager_mode(
    modules: Any, algorithm: str, block: str, precision: str, dropouts: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    how = PRECISIONS[precision]
    monkeypatch.setattr(products, "_is_emulated", lambda dtype: how.is_emulated)
    case = adapted(BLOCKS[block], algorithm, *modules, **dropouts)
    inputs = case.inputs(4, 6)
    expected = step(case.block, inputs, case.parameters(), is_autocast=how.is_autocast)
    compiled, counter = counting(case.block)
    assert_same(step(compiled, inputs, case.parameters(), is_autocast=how.is_autocast), expected, how.tolerance)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", MODULES)
def test_a_checkpointed_block_is_one_graph_that_drops_alike_in_both_forwards(modules: Any, algorithm: str):
    case = adapted(BLOCKS["Anima"], algorithm, *modules, **DROPOUTS)

    def checkpointed(**inputs: Any) -> Any:
        return checkpoint(case.block, use_reentrant=False, **inputs)

    inputs = case.inputs(4, 6)
    compiled, counter = counting(checkpointed)
    assert_same(step(compiled, inputs, case.parameters()), step(case.block, inputs, case.parameters()))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", MODULES)
def test_new_numbers_of_tokens_make_no_more_graphs_than_there_are_ways(modules: Any, algorithm: str):
    case = adapted(BLOCKS["Anima"], algorithm, *modules)
    compiled, counter = counting(case.block)
    ways = set()
    for height, width in SIZES:
        inputs = case.inputs(height, width)
        expected = step(case.block, inputs, case.parameters())
        ways.add(tuple(adapter.choice.taken for adapter in case.network.adapters))
        assert_same(step(compiled, inputs, case.parameters()), expected)
    assert counter.frame_count <= 1 + len(ways)  # the first is of the first size alone


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", MODULES)
def test_a_compiled_block_follows_what_is_done_to_its_network(modules: Any, algorithm: str):
    case = adapted(BLOCKS["Anima"], algorithm, *modules)
    network, inputs = case.network, case.inputs(4, 6)
    compiled, _ = counting(case.block)
    outputs = {}
    for name, change in CHANGES.items():
        change(network)
        outputs[name] = step(compiled, inputs, [])
        assert_same(outputs[name], step(case.block, inputs, []))
    assert torch.equal(outputs["off"][0], outputs["detached"][0])
    assert len({float(output[0].norm()) for output in outputs.values()}) == len(outputs) - 2  # on is half, off is detached


@pytest.mark.slow
@pytest.mark.parametrize(("model", "algorithm"), [("SDXL", "LoKr"), ("Anima", "LoRA"), ("Anima", "LoHa"), ("Anima", "LoKr")])
def test_a_whole_denoiser_is_one_graph(modules: Any, model: str, algorithm: str):
    case = adapted(WHOLE[model], algorithm, *modules)
    inputs = case.inputs(8, 8)
    compiled, counter = counting(case.block, "eager")
    assert_same(step(compiled, inputs, case.parameters()), step(case.block, inputs, case.parameters()))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
@pytest.mark.parametrize("algorithm", MODULES)
def test_generated_code_computes_the_same(modules: Any, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = adapted(BLOCKS["SDXL ResNet"], algorithm, *modules)
    inputs = case.inputs(4, 6)
    compiled, counter = counting(case.block, "inductor")
    assert_same(step(compiled, inputs, case.parameters()), step(case.block, inputs, case.parameters()))
    assert counter.frame_count == 1
