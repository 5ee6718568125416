"""Run by two processes: the gradients that each case gives them, against those of one process with the joint batch; writes JSON.

    gradients_of_two.py OUT.json IMAGES.toml OUTPUT CASE... -- FAMILY OPTIONS...

A case is `name=extra options`, split at blanks. The same script measures FSDP2, where that is launched.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from library.core.command_line import OptionSet, parse_command_line
from library.data.batch import Batch, Sizes
from library.data.dataset import TrainingData
from library.data.loader import batch_loader
from library.diffusion.loss import LossOptions
from library.models.architecture import Architecture, architecture_named
from library.training.adapters import TrainedNetwork
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer
from library.training.parallel.choice import accelerator_arguments, engine_of
from library.training.parallel.engine import Engine
from library.training.parallel.team import Team
from library.training.precision import PrecisionOptions
from library.training.prepare import load_data
from library.training.retired import refused_options
from library.training.run import option_groups
from library.training.setup import adapted_models, trainable_model
from library.training.step import StepContext, acting_at, batch_loss

STEPS = 2


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one."""
    first = batches[0]
    sizes = Sizes(**{name: torch.cat([getattr(batch.sizes, name) for batch in batches]) for name in vars(first.sizes)})

    def cat(name: str) -> Any:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else torch.cat(values)

    def listed(name: str) -> list[Any]:
        return [item for batch in batches for item in getattr(batch, name)]

    return Batch(
        images=listed("images"), captions=listed("captions"), sizes=sizes, draws=listed("draws"), loss_weights=cat("loss_weights"),
        pixels=cat("pixels"), latents=cat("latents"), mask=cat("mask"), preserves=cat("preserves"),
        network_multiplier=first.network_multiplier, epoch=first.epoch,
    )  # fmt: skip


def gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """What the parameters' gradients are now, which are taken away."""
    found = [torch.zeros_like(it) if it.grad is None else it.grad.detach().clone() for it in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def measure(arch: Architecture, options: OptionSet, accelerator: Accelerator) -> dict[str, Any]:
    """One case."""
    engine, data = engine_of(accelerator, options), load_data(arch, options, 1)
    trained = adapted_models(ready(arch, options, accelerator, data))
    model = trainable_model(arch, options, accelerator, data, trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters:  # off their start, where many gradients are zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    optimizer = build_optimizer(trained.groups, options[OptimizerOptions], seed=1)
    prepared, optimizer = engine.prepare(arch, model, optimizer, is_placed=False)
    context = context_of(arch, options, accelerator, trained, prepared)
    return compared(context, engine, list(trained.parameters), data, options)


def ready(arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData) -> Any:
    """As much of what stands before the models are loaded as they take."""
    engine, team = engine_of(accelerator, options), Team(0, 1, None)
    return SimpleNamespace(arch=arch, options=options, accelerator=accelerator, data=data, engine=engine, team=team)


def context_of(arch: Architecture, options: OptionSet, accelerator: Accelerator, trained: TrainedNetwork, model: nn.Module) -> StepContext:
    """What a step of a model needs."""
    return StepContext(
        arch=arch, process=arch.noise_process(options[arch.NoiseOptions], options[arch.ModelOptions]), model=model,
        vae=trained.models.vae, tokenizers=trained.models.tokenizers, model_options=options[arch.ModelOptions],
        loss=options[LossOptions], seed=1, device=accelerator.device,
    )  # fmt: skip


def compared(context: StepContext, engine: Engine, parameters: list[torch.nn.Parameter], data: Any, options: OptionSet) -> dict[str, Any]:
    accelerator = engine.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    loaders = [iter(batch_loader(data, 0, rank=it, world=world)) for it in range(world)]
    worst = sizes = 0.0
    draws: list[Any] = []
    for _ in range(STEPS):
        batches = [next(loader) for loader in loaders]
        draws += gather_object([[batches[rank].draws, float(batches[rank].pixels.sum())]])
        one = replace(context, model=context.own_model)
        with engine.alone(context.model), torch.no_grad():
            if rank == 0:  # as previews do: nobody else computes now, and nobody waits for ever afterwards
                batch_loss(one, batches[0])
        with engine.synchronised(context.model, is_last=True), acting_at(context, batches[rank].network_multiplier):
            engine.backward(context.model, batch_loss(context, batches[rank]).mean, is_last=True)
        engine.share_gradients(parameters)
        ours = gradients(parameters)
        joint = joined(batches)
        with acting_at(one, joint.network_multiplier):
            batch_loss(one, joint).mean.backward()
        theirs = gradients(parameters)
        size = torch.cat([it.flatten().float() for it in theirs]).norm()
        worst = max(worst, float(torch.cat([(a - b).flatten().float() for a, b in zip(ours, theirs, strict=True)]).norm() / size))
        sizes = max(sizes, float(size))
    return {"worst": worst, "size": sizes, "draws": draws, "count": len(parameters)}


def main(argv: list[str]) -> None:
    """Measure every case."""
    out, dataset, output, *rest = argv
    cut = rest.index("--")
    cases, (family, *files) = rest[:cut], rest[cut + 1 :]
    arch, results = architecture_named(family), {}
    accelerator: Accelerator | None = None
    for case in cases:
        name, _, extra = case.partition("=")
        given = [*files, "--dataset_config", dataset, "--output_dir", output, "--network_dim", "2", "--max_data_loader_n_workers", "0"]
        options = parse_command_line(option_groups(arch), [*given, *extra.split()], prog="two", about="", refuse=refused_options(arch))
        if options[PrecisionOptions].mixed_precision != "no" or accelerator is None:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(**accelerator_arguments(options))
        results[name] = measure(arch, options, accelerator)
    assert accelerator is not None
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
