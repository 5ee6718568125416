"""How far the estimate of memory is from what a step takes: `python -m benchmarks.memory`.

Every case is estimated as `--plan` does, on fakes, and then made with real weights on the CPU, where torch's profiler sees every
allocation. The toys of `assets/` take a minute; `--size full` adds SDXL and Anima at full size with weights of zero, bfloat16, small
pictures, which takes 8 GB of memory and, without bfloat16 instructions, half an hour. What a GPU adds (CUDA's context, the allocator's
slack) is not in either number.
Writes `benchmarks/results/memory.json` and a Markdown table to the screen.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import allocator_peak
from benchmarks.results import FOLDER, machine
from library.core.command_line import OptionSet, parse_command_line
from library.core.config_file import read_toml
from library.models.architecture import Architecture, architecture_named
from library.models.forecast import forecast_of
from library.models.presets import presets
from library.training.adapters import NetworkOptions, TrainedNetwork, build_trained_network
from library.training.forecast.ledger import total_bytes
from library.training.forecast.memory import MemoryFacts, forecast_run
from library.training.forecast.phases import Shape, state_bytes, step_inputs
from library.training.forecast.stand_in import own_bytes
from library.training.memory.options import MemoryOptions
from library.training.model import TrainingModel
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer
from library.training.precision import PrecisionOptions
from library.training.run import option_groups

ASSETS = Path(__file__).parent.parent / "assets"
TOYS = {
    "sdxl": (str(ASSETS / "toy_sdxl.safetensors"),),
    "anima": (*(str(ASSETS / "toy_anima" / "dit.safetensors"), "--qwen3", str(ASSETS / "toy_anima" / "qwen3.safetensors")),
              "--vae", str(ASSETS / "toy_anima" / "vae.safetensors")),
}  # fmt: skip
ABSENT = {"sdxl": ("absent.safetensors",), "anima": ("absent.safetensors", "--qwen3", "absent", "--vae", "absent")}
WAYS = ((), ("--mixed_precision", "bf16"), ("--mixed_precision", "bf16", "--gradient_checkpointing"))
TOY_SHAPE, FULL_SHAPE = Shape(width=128, height=96, batch=2), Shape(width=256, height=256, batch=1)
ON_CPU = ("--blocks_to_swap", "0", "--activation_memory_budget", "none")  # no blocks are swapped; with small pictures no bound is reached
PARTS = ("weights", "adapter", "optimizer", "step")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: estimated and measured bytes by part; `step` is the peak of forward and backward beyond what was there."""

    title: str
    estimated: dict[str, int]
    measured: dict[str, int]

    def error(self, part: str) -> float:
        """The estimate's relative error."""
        return self.estimated[part] / self.measured[part] - 1


def run_case(family: str, files: Sequence[str], shape: Shape, size: str, words: Sequence[str]) -> Case:
    """Estimate and measure one run."""
    arch = architecture_named(family)
    argv = ["--pretrained_model_name_or_path", *files, "--output_dir", "unused", "--network_train_unet_only", "--network_dim", "8", *words]
    options = parse_command_line(option_groups(arch), argv, prog="benchmarks.memory", about="", presets=presets(arch))
    facts = forecast_run(arch, options, [shape], text_is_cached=True, as_on_gpu=False).memory
    title = f"{family}, {size}, {shape}, {' '.join(word.removeprefix('--') for word in words if word != '--network_module')}"
    return Case(title=title, estimated=estimated(facts), measured=measured(arch, options, shape))


def estimated(facts: MemoryFacts) -> dict[str, int]:
    """The estimate by part."""
    sizes = {part.name: part.bytes for part in facts.parts}
    step = sum(sizes.get(name, 0) for name in ("activations", "gradients", "working space"))
    return {"weights": sizes["denoiser"], "adapter": sizes["adapter"], "optimizer": sizes["optimizer"], "step": step}


def measured(arch: Architecture, options: OptionSet, shape: Shape) -> dict[str, int]:
    """The same of a step that is made."""
    models = arch.outlined(options[arch.ModelOptions])
    for model in (models.denoiser, *models.text_encoders):
        _fill(model, options[PrecisionOptions].weight_dtype)
    trained = build_trained_network(models, options[NetworkOptions], options[OptimizerOptions], text_is_cached=True)
    if options[MemoryOptions].gradient_checkpointing:
        denoiser: Any = models.denoiser
        denoiser.enable_gradient_checkpointing()
    model = TrainingModel(arch, models.denoiser, [], trained.network, trains_text_encoders=False)
    known = forecast_of(arch, options[arch.ModelOptions])
    assert known is not None
    with torch.no_grad():
        text = arch.encode_text(models.text_encoders, known.tokens(shape.batch))
    step = _peak_of_step(model, arch, text, shape, options[PrecisionOptions].weight_dtype)
    return {
        "weights": own_bytes(models.denoiser),
        "adapter": total_bytes(chain(trained.network.parameters(), trained.network.buffers())),
        "optimizer": _states(trained, options),
        "step": step,
    }


def _peak_of_step(model: TrainingModel, arch: Architecture, text: Any, shape: Shape, precision: torch.dtype) -> int:
    """The most bytes that torch's allocator held at once during forward and backward, beyond what it held before."""
    noisy, timesteps, sizes = step_inputs(arch, shape)
    is_half = precision is torch.bfloat16

    def step() -> None:
        with torch.autocast("cpu", dtype=precision) if is_half else nullcontext():
            loss = F.mse_loss(model(noisy, timesteps, text, sizes).float(), noisy)
        loss.backward()

    return allocator_peak(step)


def _states(trained: TrainedNetwork, options: OptionSet) -> int:
    optimizer = build_optimizer(trained.groups, options[OptimizerOptions])
    optimizer.step()
    return state_bytes(optimizer)


def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model without weights zeros, frozen."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and (buffer.is_meta or buffer.is_floating_point()):
                module._buffers[name] = torch.zeros(buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
    model.eval()


def cases(size: str, families: Sequence[str]) -> Iterator[Case]:
    """Every case, one after another."""
    lora = ("--network_module", "networks.lora")
    for family in families:
        for module in ("networks.lora", "networks.loha", "networks.lokr"):
            for way in WAYS:
                yield run_case(family, TOYS[family], TOY_SHAPE, "toy", ("--network_module", module, *way))
        for name, file in presets(architecture_named(family)).items():
            batch = read_toml(file, "preset")[0]["train_batch_size"]
            yield run_case(family, TOYS[family], replace(TOY_SHAPE, batch=batch), "toy", (*lora, "--preset", name, *ON_CPU))
        if size == "full":
            for way in WAYS[1:]:
                yield run_case(family, ABSENT[family], FULL_SHAPE, "full", (*lora, *way))


def report(found: Sequence[Case]) -> str:
    """The table as Markdown: measured megabytes, and the estimate's error."""
    lines = [f"| case | {' | '.join(f'{part}, MB' for part in PARTS)} |", "| --- |" + " --- |" * len(PARTS)]
    for case in found:
        cells = (f"{case.measured[part] / 1e6:.1f} ({case.error(part):+.1%})" for part in PARTS)
        lines.append(f"| {case.title} | {' | '.join(cells)} |")
    worst = {part: max((case.error(part) for case in found), key=abs) for part in PARTS}
    lines.append(f"| **largest error** | {' | '.join(f'{worst[part]:+.1%}' for part in PARTS)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("toy", "full"), default="toy", help="full adds SDXL and Anima at full size")
    parser.add_argument("--family", nargs="+", choices=tuple(TOYS), default=list(TOYS))
    parser.add_argument("--output", type=Path, default=FOLDER / "memory.json")
    options = parser.parse_args(argv)
    found = []
    for case in cases(options.size, options.family):
        found.append(case)
        print(case.title, file=sys.stderr, flush=True)
        options.output.write_text(json.dumps({"machine": machine("cpu"), "cases": [asdict(each) for each in found]}, indent=1) + "\n")
    print(report(found))


if __name__ == "__main__":
    main(sys.argv[1:])
