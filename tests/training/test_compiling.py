"""Compiled blocks: the values of eager mode, a closed set of graphs, and nothing compiled again without a word."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_anima import build_small_anima
from torch import Tensor, nn

from library.core.command_line import OptionSet, parse_command_line
from library.core.options import OptionError
from library.core.quantised import pack_layers
from library.models.anima.denoiser import AnimaDiT
from library.models.architecture import architecture_named
from library.models.attention import set_attention
from library.training import compiling
from library.training.compiling import CompileOptions, Watch, compile_blocks, refuse_compilation, set_graph_limit
from library.training.memory.options import MemoryOptions
from networks import loha, lokr, lora
from networks.network import Network

CPU = torch.device("cpu")
ALGORITHMS: dict[str, Any] = {"LoRA": lora, "LoHa": loha, "LoKr": lokr}
SIZES = ((1, 8, 8), (2, 8, 8), (2, 8, 16))  # samples, height and width of latents: two buckets, a partial and whole batches


@dataclass
class Compiled:
    """A tiny denoiser with a trained network on it, of which `blocks` are to be compiled."""

    family: str
    denoiser: nn.Module
    network: Network

    def compile(self, **options: Any) -> Watch:
        """Compile a few blocks: what compiling takes is the time of these tests."""
        options.setdefault("compile_backend", "eager")
        blocks = architecture_named(self.family).blocks(self.denoiser)
        arch: Any = SimpleNamespace(blocks=lambda denoiser: blocks[:2] if self.family == "anima" else blocks[1:3])
        watch = compile_blocks(arch, self.denoiser, CompileOptions(compile=True, **options))
        assert watch is not None
        set_graph_limit(1000)
        return watch

    def step(self, batch: int, height: int, width: int) -> list[Tensor]:
        """A pass and the gradients of all that is trained."""
        generator = torch.Generator().manual_seed(batch + height + width)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.network.zero_grad()
        if self.family == "anima":
            output = self.denoiser(draw(batch, 16, height, width), torch.full((batch,), 0.5), draw(batch, 7, 24))
        else:
            added = {"text_embeds": draw(batch, 128), "time_ids": torch.zeros(batch, 6)}
            text = draw(batch, 5, 192)
            output = self.denoiser(draw(batch, 4, height, width), torch.full((batch,), 5), text, added_cond_kwargs=added).sample
        if not torch.is_grad_enabled():
            return [output]
        output.square().mean().backward()
        return [output.detach(), *(parameter.grad for parameter in self.network.parameters() if parameter.grad is not None)]


def with_network(family: str, unet: nn.Module, algorithm: str = "LoRA", *, packs: bool = False) -> Compiled:
    torch._dynamo.reset()
    if family == "anima":
        modules: Any = build_small_anima().denoiser
        denoiser: nn.Module = AnimaDiT(modules["transformer"], modules["text_conditioner"])
    else:
        denoiser = copy.deepcopy(unet)
        set_attention(denoiser, "torch")
    if packs:
        pack_layers(denoiser, "nf4", smallest=64)
    torch.manual_seed(0)
    network = ALGORITHMS[algorithm].create_network(1.0, 2, 1.0, None, [], denoiser.requires_grad_(False))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.attach()
    return Compiled(family, denoiser, network)


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm()) + 1e-6


@pytest.fixture
def unet(small_sdxl_modules: SimpleNamespace) -> nn.Module:
    return small_sdxl_modules.unet


@pytest.mark.slow
@pytest.mark.parametrize("family", ["anima", "sdxl"])
@pytest.mark.parametrize("dynamic", ["false", "auto"])
def test_nothing_is_compiled_again_once_every_shape_was_seen(family: str, dynamic: str, unet: nn.Module) -> None:
    case = with_network(family, unet)
    expected = {size: case.step(*size) for size in SIZES}
    watch = case.compile(compile_dynamic=dynamic)
    for size in SIZES:
        assert_same(case.step(*size), expected[size])
    before = compiling._graphs()
    for size in reversed(SIZES):
        assert_same(case.step(*size), expected[size])
    assert compiling._graphs() == before > 0 and watch.recompiled == 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["anima", "sdxl"])
def test_one_graph_can_hold_for_all_sizes(family: str, unet: nn.Module) -> None:
    case = with_network(family, unet)
    first, second = (3, 8, 20), (3, 8, 28)  # torch takes sides that are equal in its first input for equal in all
    expected = [case.step(*first), case.step(*second)]
    case.compile(compile_dynamic="true")
    assert_same(case.step(*first), expected[0])
    before = compiling._graphs()
    assert_same(case.step(*second), expected[1])
    assert compiling._graphs() == before, torch._dynamo.utils.guard_failures


@pytest.mark.slow
def test_strengths_have_graphs_of_their_own_and_come_back_to_them(unet: nn.Module) -> None:
    case = with_network("anima", unet, "LoHa")
    watch = case.compile(compile_dynamic="false")

    def outputs() -> list[Tensor]:
        found = []
        for strength in (1.0, 0.5, 0.0, 1.0):
            case.network.set_multiplier(strength)
            with torch.no_grad():
                found += case.step(*SIZES[0])
        return found

    first = outputs()
    before = compiling._graphs()
    assert_same(outputs(), first)
    assert compiling._graphs() == before and watch.recompiled == 0
    assert not torch.equal(first[0], first[1]) and torch.equal(first[0], first[3])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["anima", "sdxl"])
def test_checkpointed_and_packed_blocks_compile_too(family: str, unet: nn.Module) -> None:
    case = with_network(family, unet, packs=True)
    expected = case.step(*SIZES[2])
    model: Any = case.denoiser
    model.enable_gradient_checkpointing()
    model.train()
    case.compile(compile_fullgraph=True, compile_backend="aot_eager")
    assert_same(case.step(*SIZES[2]), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
def test_inductor_computes_the_same(unet: nn.Module, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = with_network("anima", unet)
    expected = case.step(*SIZES[0])
    case.compile(compile_backend="inductor")
    assert_same(case.step(*SIZES[0]), expected)


def test_a_second_graph_for_the_same_shape_is_said_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([0, 1, 1, 1, 1, 1, 1, 2, 2])
    monkeypatch.setattr(compiling, "_graphs", lambda: next(counts))
    failures = {"code": [], "other code": ["1/0: long before"]}
    monkeypatch.setattr(torch._dynamo.utils, "guard_failures", failures)
    said: list[str] = []
    monkeypatch.setattr(compiling.logger, "warning", lambda message, *values: said.append(message % values))
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *given: failures["code"].append("0/0: a guard failed"))
    watch = Watch(layer)
    for _ in range(3):
        layer(torch.ones(1, 2))
    assert said == ["--compile: 1 graphs were compiled again for a shape that was seen before: 0/0: a guard failed"]
    assert watch.recompiled == 1


def test_graphs_are_counted_from_buckets_batch_sizes_and_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(samples: int, bucket: tuple[int, int]) -> Any:
        return SimpleNamespace(samples=(0,) * samples, bucket=bucket)

    plans = [plan(2, (64, 64)), plan(2, (64, 64)), plan(1, (64, 64)), plan(2, (64, 128))]
    datasets = [SimpleNamespace(options=SimpleNamespace(network_multiplier=strength)) for strength in (1.0, -0.5)]
    held_out = SimpleNamespace(order=lambda epoch: [plan(3, (64, 64))], datasets=[], validation=None)
    images = [SimpleNamespace(preserves=False)]
    data: Any = SimpleNamespace(order=lambda epoch: plans, datasets=datasets, validation=held_out, images=images)
    assert compiling.batch_shapes(data) == {(2, (64, 64)), (1, (64, 64)), (2, (64, 128)), (3, (64, 64))}
    limits: list[int] = []
    monkeypatch.setattr(compiling, "set_graph_limit", limits.append)
    arch: Any = SimpleNamespace(blocks=lambda denoiser: [nn.Identity(), nn.Identity()])
    compile_blocks(arch, nn.Identity(), CompileOptions(compile=True), data)
    compile_blocks(arch, nn.Identity(), CompileOptions(compile=True, compile_cache_size_limit=7), data)
    assert limits == [(4 * 2 * 2 + compiling.OTHER_PASSES) * 2, 7]


def test_samples_that_preserve_are_passes_of_their_own() -> None:
    plans = [SimpleNamespace(samples=(0, 0, 0), bucket=(64, 64))]
    images, datasets = [SimpleNamespace(preserves=True)], [SimpleNamespace(options=SimpleNamespace(network_multiplier=1.0))]
    data: Any = SimpleNamespace(order=lambda epoch: plans, datasets=datasets, validation=None, images=images)
    assert compiling.batch_shapes(data) == {(count, (64, 64)) for count in (1, 2, 3)}
    assert compiling.strengths(data) == {0.0, 1.0}


def test_nothing_is_touched_without_compile() -> None:
    arch: Any = SimpleNamespace(blocks=lambda denoiser: pytest.fail("blocks were asked for"))
    assert compile_blocks(arch, nn.Identity(), CompileOptions()) is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"compile": True, "compile_backend": "inductr"}, "--compile_backend: unknown backend 'inductr'; did you mean 'inductor'"),
        ({"compile_cache_size_limit": 0}, "--compile_cache_size_limit 0: must be at least 1"),
    ],
)
def test_a_mistake_in_the_options_is_answered(given: dict[str, Any], problem: str) -> None:
    assert any(problem in said for said in CompileOptions(**given).check())


def options(*argv: str) -> OptionSet:
    return parse_command_line([CompileOptions, MemoryOptions], list(argv), prog="x", about="x", refuse={})


@pytest.mark.parametrize("flags", [("--compile", "--compile_backend"), ("--torch_compile", "--dynamo_backend")])
def test_both_spellings_of_sd_scripts_are_read(flags: tuple[str, str]) -> None:
    read = options(flags[0], flags[1], "aot_eager")[CompileOptions]
    assert read.compile and read.arguments["backend"] == "aot_eager" and "mode" not in read.arguments


def broken(*_: Any, **__: Any) -> Callable[..., Any]:
    raise RuntimeError("no compiler found\nsee above")


def test_what_cannot_be_compiled_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    arch: Any = SimpleNamespace(has_blocks=False, title="Toy")
    with pytest.raises(OptionError, match="--compile: Toy has no row of blocks to compile"):
        refuse_compilation(arch, options("--compile"), CPU)
    arch.has_blocks = True
    with pytest.raises(OptionError, match="--compile_mode max-autotune: its CUDA graphs cannot follow weights that are swapped"):
        refuse_compilation(arch, options("--compile", "--compile_mode", "max-autotune", "--blocks_to_swap", "2"), CPU)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile: torch.compile does not work on cpu here \(no compiler found\); leave it out"):
        refuse_compilation(arch, options("--compile"), CPU)
