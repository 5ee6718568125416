"""What a whole training step costs in every way, over the frozen model: `python -m benchmarks.step`.

A step is forward, backward and AdamW; of the frozen model forward and the gradient of its input. On a CPU models of SDXL's and Anima's
classes with 100 to 200 M parameters, float32, one thread, a quarter of an hour (`--quick` half of it); with `--device cuda` the
full-size ones with random weights, 1024 x 1024, bfloat16 under autocast with float32 factors, batch 1 and 4, with and without
checkpointing. All ways start from the same values, so their losses agree.
Writes `benchmarks/results/step.json` and Markdown tables to the screen.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import goals
from benchmarks.contest import interleaved
from benchmarks.measure import traced
from benchmarks.peers import ALGORITHMS, LYCORIS_BYPASS, OURS, PEFT, SD_SCRIPTS, Setting, Way, available_ways, take_over, trained, twin
from benchmarks.results import FOLDER, FROZEN, Row, Rows, machine, ratio, read, results_file, rounded, way_table, write
from benchmarks.shapes import CORE, LOHA_32
from benchmarks.step_models import SUBJECTS, Subject

Lineup = Sequence[tuple[Setting, str]]
QUICK: Lineup = [(setting, way) for setting in CORE for way in (OURS, SD_SCRIPTS)]
WHOLE: Lineup = [
    *(
        (setting, way) for setting in CORE for way in (OURS, SD_SCRIPTS, LYCORIS_BYPASS, PEFT)
    ),  # LyCORIS' other mode costs as sd-scripts' way
    *((LOHA_32, way) for way in (OURS, SD_SCRIPTS)),
]
RATE = 1e-4
METRICS = {
    "time over the frozen model's": lambda row, base: f"{ratio(row, base):.2f}",
    "images a second": lambda row, base: f"{row.positions / statistics.median(row.seconds):.3g}",
    "kept for backward beyond the frozen model's, MB": lambda row, base: f"{(row.kept_bytes - base.kept_bytes) / 1e6:.0f}",
    "most bytes alive beyond those before the step, MB": lambda row, base: f"{row.peak_bytes / 1e6:.0f}",
    "kernels for each adapted layer": lambda row, base: f"{(row.kernels - base.kernels) / row.facts['layers']:.1f}",
    "exchanges with the host": lambda row, base: str(row.host_exchanges - base.host_exchanges),
    "loss of the last step": lambda row, base: f"{row.facts['loss']:.5f}",
}


@dataclass(kw_only=True)
class Runner:
    """A model, adapted in one way or frozen, with what is trained of it."""

    subject: Subject
    model: nn.Module
    setting: Setting | None = None
    way: str = FROZEN
    layers: int = 0
    optimizer: torch.optim.Optimizer | None = None
    is_autocast: bool
    loss: Tensor | None = None  # of the last step, on its device until it is asked for

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer trains."""
        return [] if self.optimizer is None else self.optimizer.param_groups[0]["params"]

    def forward(self) -> Tensor:
        """The loss with its graph, after dropping the gradients of the step before."""
        self.drop_gradients()
        device = self.subject.latents.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.is_autocast):
            return self.subject.loss(self.model)

    def drop_gradients(self) -> None:
        """Free the gradients of the step before."""
        for tensor in (self.subject.latents, *self.parameters):
            tensor.grad = None

    def step(self) -> None:
        """A training step."""
        loss = self.forward()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.loss = loss.detach()


def adapt_model(model: nn.Module, setting: Setting, name: str, way: Way) -> tuple[list[nn.Parameter], int]:
    """Adapt the layers of a model that our network chooses by default, in one way; the parameters and the number of layers.

    Ours is made and attached as users do it; the other ways take over its values, layer by layer.
    """
    torch.manual_seed(0)
    module = importlib.import_module(ALGORITHMS[setting.algorithm].__module__)
    network = module.create_network(1.0, setting.rank, setting.alpha, None, None, model, **setting.arguments)
    network.to(next(model.parameters()).device)
    if name == OURS:
        network.attach()
        return list(network.parameters()), len(network.adapters)
    parameters: list[nn.Parameter] = []
    for adapter in network.adapters:
        adapted = way(adapter.layer, setting).to(adapter.alpha.device)
        take_over(adapted, trained(adapter))
        parameters += trained(adapted).values()
    return parameters, len(network.adapters)


def runners(subject: Subject, lineup: Lineup, is_autocast: bool) -> Iterator[Runner]:
    """The frozen model and every way, each on a copy that shares the weights; what does not fit into memory is said and left out."""
    frozen = Runner(subject=subject, model=subject.denoiser, is_autocast=is_autocast)
    frozen.step()
    yield frozen
    ways = available_ways()
    for setting, name in lineup:
        if name in ways:
            try:
                yield _adapted(frozen, setting, name, ways[name])
            except torch.OutOfMemoryError:
                print(f"{subject.title}: {setting.title}, {name}: does not fit into the memory", file=sys.stderr)


def _adapted(frozen: Runner, setting: Setting, name: str, way: Way) -> Runner:
    model = twin(frozen.model)
    parameters, layers = adapt_model(model, setting, name, way)
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    runner = replace(frozen, model=model, setting=setting, way=name, layers=layers, optimizer=optimizer)
    runner.step()
    return runner


def measure(subject: Subject, case: str, lineup: Lineup, seconds: float, is_autocast: bool = False) -> list[Row]:
    """The rows of one model."""
    taking_part = list(runners(subject, lineup, is_autocast))
    device = subject.latents.device.type
    times = interleaved([runner.step for runner in taking_part], device, seconds=seconds)
    return [_row(runner, case, spent, device) for runner, spent in zip(taking_part, times, strict=True)]


def _row(runner: Runner, case: str, seconds: list[float], device: str) -> Row:
    assert runner.loss is not None
    runner.drop_gradients()  # else a GPU's memory before the step has them, and the step seems to need less
    return Row(
        case=case,
        precision="autocast" if runner.is_autocast else "float32",
        setting=runner.setting.title if runner.setting else "",
        way=runner.way,
        positions=runner.subject.latents.shape[0],
        seconds=[rounded(value) for value in seconds],
        facts={"layers": runner.layers, "loss": rounded(float(runner.loss), 6), "gpu": float(device != "cpu")},
        **asdict(traced(runner.forward, owned=[*runner.model.parameters(), *runner.parameters], device=device)),
    )


def run(size: str, families: Sequence[str], lineup: Lineup, device: str, seconds: float, path: Path) -> Rows:
    """Everything asked for; the file is written after every case, so that what is interrupted is not lost."""
    found: list[Row] = []
    on_gpu = device != "cpu"
    facts = machine(device)
    for family in families:
        for batch in (1, 4) if on_gpu else (1,):
            for is_checkpointed in (False, True) if on_gpu else (False,):
                subject = SUBJECTS[size][family](batch, device, torch.bfloat16 if on_gpu else torch.float32)
                if is_checkpointed:
                    subject.denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]: a method of diffusers' models
                case = subject.title + (", checkpointing" if is_checkpointed else "")
                found += measure(subject, case, lineup, seconds, is_autocast=on_gpu)
                write(path, facts, Rows(found))
                print(case, file=sys.stderr, flush=True)
    return Rows(found)


def report(rows: Rows) -> str:
    """All tables as Markdown."""
    ways = [way for way in dict.fromkeys(row.way for row in rows) if way != FROZEN]
    precisions = dict.fromkeys(row.precision for row in rows)
    parts = [
        f"**{precision}: {title}**\n\n{way_table(rows, precision, ways, cell)}"
        for precision in precisions
        for title, cell in METRICS.items()
    ]
    return "\n\n".join([*parts, "**Goals**\n\n" + goals.table(goals.judged(goals.STEP_GOALS, rows))])


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=SUBJECTS["full"], default=list(SUBJECTS["full"]))
    parser.add_argument("--quick", action="store_true", help="only ours and sd-scripts' way in three settings")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SUBJECTS, help="of the models; full on a GPU, small on a CPU")
    parser.add_argument("--seconds", type=float, default=100, help="of timing for each model; there are at least three turns")
    parser.add_argument("--output", type=Path, default=FOLDER / "step.json")
    parser.add_argument("--report", type=results_file, help="measure nothing: the tables of these results")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    torch.set_num_threads(1)
    size = options.size or ("full" if options.device == "cuda" else "small")
    lineup = QUICK if options.quick else WHOLE
    rows = read(options.report)[1] if options.report else run(size, options.family, lineup, options.device, options.seconds, options.output)
    print(report(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
