"""What a network costs besides its training step: `python -m benchmarks.life [--quick] [--before FILE] [--report FILE]`.

On the layers of full-size SDXL, U-Net and text encoders with convolutions: import, create, attach, save, load, bound norms, clip, and
the optimizer's step, each beside a floor: the same bytes drawn, cast, hashed, written or summed in one piece. Merging into the U-Net's
722 default layers in fp16 is beside sd-scripts' way of it, written here from the facts: a search of all keys for each layer, the whole
delta in float32, a new weight, `load_state_dict`; once with the allocator as it is, once with one that keeps its memory, for half of that
way's time is fresh pages. One thread; median seconds that the thread computed, and for what waits for the disk
those on the wall. `--before` names the results of an earlier run, for a column. Writes `benchmarks/results/life.json` and Markdown tables
to the screen, with the goals of docs/performance.md.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import goals, results
from benchmarks.results import results_file
from library.models.naming import naming_named
from networks import loha, lokr, lora
from networks.base import Adapter
from networks.network import Network

RESULTS = results.FOLDER / "life.json"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}  # glibc: give nothing back, fault no page anew
REPEATS = 3
CLOCKED_IMPORT = "import time, torch; started = time.perf_counter(); import {}; print(time.perf_counter() - started)"


FLOORS = {
    "create": "draw",
    "save": "cast, hash, write",
    "save, wall": "the same",
    "load a network": "copy",
    "load into one": "copy",
    "clip": "one tensor",
    "step": "one tensor",
}
"""What is timed beside a step of the life."""


@dataclass(frozen=True)
class Variant:
    """An algorithm with its settings."""

    title: str
    module: ModuleType
    algorithm: type[Adapter]
    rank: int
    arguments: dict[str, Any]


VARIANTS = (
    Variant("LoRA r16", lora, lora.LoRA, 16, {}),
    Variant("LoHa r32", loha, loha.LoHa, 32, {}),
    Variant("LoKr f8 r32", lokr, lokr.LoKr, 32, {"factor": 8}),
)


@dataclass(frozen=True)
class Figure:
    """Seconds of one step of a network's life by turn, and of what it is compared with."""

    what: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    other: str = ""
    others: list[float] = field(default_factory=list)

    def add(self, ours: float, other: float | None = None) -> None:
        """One turn."""
        self.seconds.append(ours)
        if other is not None:
            self.others.append(other)

    @property
    def ratio(self) -> float | None:
        """The median of the ratios by turn; None for what stands alone."""
        return statistics.median(ours / other for ours, other in zip(self.seconds, self.others, strict=True)) if self.others else None


def computed(run: Callable[[], object]) -> float:
    """Seconds that this thread computes in a run, whatever else the machine does."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def both_clocks(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that this thread computes, and those on the wall."""
    started = time.perf_counter()
    return computed(run), time.perf_counter() - started


# The life of a network


def life(variant: Variant, parts: list[nn.Module], folder: Path, turns: int) -> Iterator[Figure]:
    """Everything but merging."""
    figures: dict[str, Figure] = {}
    for _ in range(turns):
        for what, ours, other in turn(variant, parts, folder):
            figures.setdefault(what, Figure(what, variant.title, other=FLOORS.get(what, ""))).add(ours, other)
    yield from figures.values()


def turn(variant: Variant, parts: list[nn.Module], folder: Path) -> Iterator[tuple[str, float, float | None]]:
    """Each step of the life once, with the seconds of its floor."""
    command = [sys.executable, "-c", CLOCKED_IMPORT.format(variant.module.__name__)]
    yield "import", float(subprocess.run(command, capture_output=True, text=True, check=True).stdout), None
    started = time.thread_time()
    network = create(variant, parts)
    yield "create", time.thread_time() - started, computed(lambda: draw(network))
    yield "attach, detach", computed(lambda: (network.attach(), network.detach())), None
    file, values = folder / "network.safetensors", list(network.state_dict().values())
    yield from saving(network, values, file, folder)
    loaded = computed(lambda: variant.module.create_network_from_weights(1.0, file, None, parts[1:], parts[0]))
    floor = computed(lambda: [value.clone() for value in values])
    yield "load a network", loaded, floor
    yield "load into one", computed(lambda: network.load_weights(file)), floor
    yield "bound norms", computed(lambda: network.apply_max_norm_regularization(1e9)), None
    yield from updating(network)


def create(variant: Variant, parts: list[nn.Module]) -> Network:
    """A network on all layers, text encoders' and convolutions' too."""
    return variant.module.create_network(1.0, variant.rank, 1.0, None, parts[1:], parts[0], conv_dim=variant.rank, **variant.arguments)


def draw(network: Network) -> list[Tensor]:
    """The random numbers of a network in one tensor, and its zeros."""
    drawn = sum(parameter.numel() for parameter in network.parameters() if parameter.any())
    return [torch.empty(drawn).normal_(), torch.zeros(sum(parameter.numel() for parameter in network.parameters()) - drawn)]


def saving(network: Network, values: list[Tensor], file: Path, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Save in fp16, against the bytes as one piece."""

    def plain() -> None:
        content = torch.cat([value.detach().flatten().half() for value in values]).numpy().data
        hashlib.sha256(content).hexdigest()
        with (folder / "new").open("wb") as target:
            target.write(content)
            os.fsync(target.fileno())
        (folder / "new").replace(folder / "plain")  # an earlier file stands until then, as ours does

    (ours, ours_waited), (floor, floor_waited) = (
        both_clocks(run) for run in (lambda: network.save_weights(file, torch.float16, {"ss_network_module": "x"}), plain)
    )
    yield "save", ours, floor
    yield "save, wall", ours_waited, floor_waited


def updating(network: Network) -> Iterator[tuple[str, float, float]]:
    """Clip and step as training does, against one tensor of all numbers."""
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    whole = nn.Parameter(torch.zeros(sum(parameter.numel() for parameter in parameters)))
    whole.grad = torch.ones_like(whole)
    both = (parameters, [whole])
    ours, floor = (computed(lambda some=some: torch.nn.utils.clip_grad_norm_(some, 1.0)) for some in both)
    yield "clip", ours, floor
    optimizers = [torch.optim.AdamW(some, lr=1e-4, fused=True) for some in both]  # as library.training.optimizing.optimizer makes it
    for optimizer in optimizers:
        optimizer.step()
    ours, floor = (computed(optimizer.step) for optimizer in optimizers)
    yield "step", ours, floor


# Merging


def merging(variant: Variant, turns: int) -> Iterator[Figure]:
    """Merging in processes of its own: what their memory went through before would decide the times."""
    for what, environment in (("merge", {}), ("merge, memory kept", KEEP_MEMORY)):
        figure = Figure(what, variant.title, other="sd-scripts' way")
        for _ in range(turns):
            command = [sys.executable, "-m", "benchmarks.life", "--merge", variant.title]
            done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
            figure.add(*json.loads(done.stdout.splitlines()[-1]))
        yield figure


def merge_seconds(variant: Variant, unet: nn.Module) -> tuple[float, float]:
    """Seconds of ours and of theirs for all default layers: one of each distinct shape, times how many there are."""
    network = variant.module.create_network(1.0, variant.rank, 1.0, None, None, unet, **variant.arguments)
    keys = [f"{adapter.name}.{key}" for adapter in network.adapters for key in adapter.state_dict()]
    ours = theirs = 0.0
    for shape, count in Counter(adapter.shape for adapter in network.adapters).items():
        layer = nn.Conv2d(shape.inner, shape.out, shape.kernel) if shape.kernel else nn.Linear(shape.inner, shape.out)
        layer = layer.half().requires_grad_(False)
        adapter = variant.algorithm.fresh("lora_unet_x", layer, variant.rank, 1.0, variant.algorithm.Arguments(**variant.arguments))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.05)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(REPEATS):
            times[False].append(computed(lambda layer=layer, adapter=adapter: merge_by_keys(layer, adapter, keys)))
            adapter.is_merged = False
            times[True].append(computed(lambda adapter=adapter: adapter.merge(keep=False)))
        theirs += count * statistics.median(times[False])
        ours += count * statistics.median(times[True])
    return ours, theirs


def merge_by_keys(layer: nn.Module, adapter: Adapter, keys: list[str]) -> None:
    """sd-scripts' way for one layer: its keys among all, the whole delta, a new weight, the state dict."""
    assert not [key for key in keys if key.startswith(adapter.name)]
    state, own = layer.state_dict(), {key: value.float() for key, value in adapter.state_dict().items()}
    weight = state["weight"].float()
    delta = whole_delta(own) * (own["alpha"] / adapter.rank)
    state["weight"] = (weight + 1.0 * delta.reshape(weight.shape)).to(torch.float16)
    layer.load_state_dict(state)


def whole_delta(own: dict[str, Tensor]) -> Tensor:
    """The delta as it stands in the papers."""
    if "lora_up.weight" in own:
        return own["lora_up.weight"].flatten(1) @ own["lora_down.weight"].flatten(1)
    if "hada_w1_a" in own:
        return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    return torch.kron(own["lokr_w1"], w2)


# The tables


def row_of(figure: Figure, before: dict[tuple[str, str], float]) -> list[str]:
    """The medians of a figure, and the median of its ratios by turn."""
    earlier = before.get((figure.what, figure.variant))
    other = statistics.median(figure.others) if figure.others else None
    seconds = ["" if value is None else f"{value:.3f}" for value in (earlier, statistics.median(figure.seconds), other)]
    return [figure.what, figure.variant, *seconds[:2], figure.other, seconds[2], "" if figure.ratio is None else f"{figure.ratio:.2f}"]


def decided_by(what: str, variant: str) -> Callable[[list[Figure]], Iterator[goals.Figure]]:
    """The ratio of one step of one network's life, or its seconds where it stands alone."""

    def found(figures: list[Figure]) -> Iterator[goals.Figure]:
        for figure in figures:
            if (figure.what, figure.variant) == (what, variant):
                value = statistics.median(figure.seconds) if figure.ratio is None else figure.ratio
                yield goals.Figure(where=f"{what}, {variant}", value=value)

    return found


LIFE_GOALS = (
    goals.Goal(text="merging LoHa into full-size SDXL, over sd-scripts' way", most=0.30, figures=decided_by("merge", "LoHa r32")),
    goals.Goal(text="merging LoKr into full-size SDXL, over sd-scripts' way", most=0.18, figures=decided_by("merge", "LoKr f8 r32")),
    goals.Goal(text="importing networks.loha after torch, seconds", most=0.3, figures=decided_by("import", "LoHa r32")),
)


def report(figures: list[Figure], before: dict[tuple[str, str], float]) -> str:
    """All figures and the goals as Markdown."""
    rows = results.markdown(["", "network", "before", "now", "beside", "seconds", "ratio"], [row_of(figure, before) for figure in figures])
    return f"{rows}\n\n**Goals**\n\n{goals.table(goals.judged(LIFE_GOALS, figures))}"


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one turn instead of three")
    parser.add_argument("--before", type=results_file, help="results of an earlier run")
    parser.add_argument("--merge", help="time merging this network only, and print two numbers of seconds")
    parser.add_argument("--report", type=results_file, help="measure nothing: the tables of these results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the results")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.merge:
        variant = next(variant for variant in VARIANTS if variant.title == given.merge)
        print(json.dumps(merge_seconds(variant, naming_named("sdxl").outline()[0][1])))
        return
    earlier = read(given.before) if given.before else []
    figures = read(given.report) if given.report else measure(1 if given.quick else 3, earlier, given.output)
    print(report(figures, {(figure.what, figure.variant): statistics.median(figure.seconds) for figure in earlier}))


def read(path: Path) -> list[Figure]:
    """The figures of a file that `measure` wrote."""
    return [Figure(**row) for row in json.loads(path.read_text(encoding="utf-8"))["figures"]]


def measure(turns: int, earlier: list[Figure], path: Path) -> list[Figure]:
    """All figures; they are written to a file beside those of an earlier run."""
    parts = [module for _, module in naming_named("sdxl").outline()]
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            figures += [*life(variant, parts, Path(folder), turns), *merging(variant, turns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = results.machine("cpu") | {"figures": list(map(asdict, figures)), "before": list(map(asdict, earlier))}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
