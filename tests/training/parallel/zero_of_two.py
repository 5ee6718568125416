"""Run by two processes: two steps of two batches with ZeRO, against the same in one process; writes JSON.

    zero_of_two.py OUT.json IMAGES.toml OUTPUT FAMILY OPTIONS...

Accelerate knows of no second process with DeepSpeed on a CPU, so ranks are asked of torch here.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from gradients_of_two import context_of, ready
from torch import distributed, nn

from library.core.command_line import OptionSet, parse_command_line
from library.data.dataset import TrainingData
from library.data.loader import batch_loader
from library.models.architecture import Architecture, architecture_named
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer
from library.training.parallel.choice import accelerator_arguments, engine_of
from library.training.prepare import load_data
from library.training.retired import refused_options
from library.training.run import option_groups
from library.training.setup import adapted_models, trainable_model
from library.training.step import acting_at, batch_loss

STEPS, BATCHES, WORLD = 2, 2, 2


def parts(arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData) -> Any:
    """Models with a network off its start, and the optimizer."""
    torch.manual_seed(1)
    trained = adapted_models(ready(arch, options, accelerator, data))
    model = trainable_model(arch, options, accelerator, data, trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trained, model, build_optimizer(trained.groups, options[OptimizerOptions], seed=1)


def plain(arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData) -> list[torch.Tensor]:
    """What one process makes of all batches."""
    trained, model, optimizer = parts(arch, options, accelerator, data)
    context = context_of(arch, options, accelerator, trained, model)
    for _, batches in zip(range(STEPS), steps_of(data, range(WORLD)), strict=False):
        for batch in batches:
            with acting_at(context, batch.network_multiplier), accelerator.autocast():
                (batch_loss(context, batch).mean / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters, options[OptimizerOptions].max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return [it.detach().clone() for it in trained.parameters]


def zero(arch: Architecture, options: OptionSet, accelerator: Accelerator, data: TrainingData) -> tuple[list[torch.Tensor], list[Any]]:
    """What the ranks make of them together, and the norms of the gradients."""
    trained, model, optimizer = parts(arch, options, accelerator, data)
    engine = engine_of(accelerator, options)
    prepared, optimizer = engine.prepare(arch, model, optimizer, is_placed=False)
    context, norms = context_of(arch, options, accelerator, trained, prepared), []
    for _, batches in zip(range(STEPS), steps_of(data, [distributed.get_rank()]), strict=False):
        for index, batch in enumerate(batches):
            is_last = index + 1 == len(batches)
            with engine.synchronised(prepared, is_last=is_last), acting_at(context, batch.network_multiplier):
                engine.backward(prepared, batch_loss(context, batch).mean / len(batches), is_last=is_last)
        engine.clip(prepared, trained.parameters, options[OptimizerOptions].max_grad_norm)
        norms.append(engine.step(prepared, optimizer))
    with engine.whole(prepared):
        return [cast(nn.Parameter, it).detach().clone() for it in trained.parameters], norms


def steps_of(data: TrainingData, ranks: Any) -> Any:
    """The batches of each step, of some ranks."""
    loaders = [iter(batch_loader(data, 0, rank=rank, world=WORLD)) for rank in ranks]
    while True:
        yield [next(loader) for _ in range(BATCHES) for loader in loaders]


def main(argv: list[str]) -> None:
    """Train both ways and compare."""
    out, dataset, output, family, *rest = argv
    arch = architecture_named(family)
    given = [*rest, "--dataset_config", dataset, "--output_dir", output, "--network_dim", "2", "--max_data_loader_n_workers", "0"]
    options = parse_command_line(option_groups(arch), given, prog="two", about="", refuse=refused_options(arch))
    accelerator = Accelerator(**accelerator_arguments(options))
    data = load_data(arch, options, 1)
    expected = plain(arch, options, accelerator, data)
    found, norms = zero(arch, options, accelerator, data)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if distributed.get_rank() == 0:
        Path(out).write_text(json.dumps({"worst": worst, "norms": norms, "moved": float(found[0].norm()), "count": len(found)}))


if __name__ == "__main__":
    main(sys.argv[1:])
