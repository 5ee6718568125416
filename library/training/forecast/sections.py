"""A forecast as sections of a plan: what is adapted, what the file weighs, and the memory by part."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from library.data.inspection.findings import Section
from library.data.inspection.report_text import amount, counted
from library.training.forecast.memory import MemoryFacts
from library.training.forecast.modules import ModuleFacts

NETWORK_HEADER = ("part", "kind", "layers", "shape", "rank", "parameters")
STEPS_HEADER = ("processes", "batches a step and process", "steps an epoch", "epochs", "steps")
MEMORY_HEADER = ("part", "where", "size", "")
ERROR = "the estimate's error is measured in docs/memory.md"


def steps_section(run: Mapping[str, int], accumulated: int) -> Section:
    """How the length of the run comes about; `run` holds `steps`, `steps_per_epoch` and `processes`."""
    epochs = math.ceil(run["steps"] / run["steps_per_epoch"])
    left = run["steps"] % run["steps_per_epoch"]
    last = (f"the last epoch ends after {left} of its {counted(run['steps_per_epoch'], 'step')}",) if left else ()
    return Section(
        title="steps",
        header=STEPS_HEADER,
        rows=((f"{run['processes']}", f"{accumulated}", f"{run['steps_per_epoch']:,}", f"{epochs:,}", f"{run['steps']:,}"),),
        lines=last,
        facts={**run, "epochs": epochs, "gradient_accumulation_steps": accumulated},
    )


def network_section(modules: Sequence[ModuleFacts], size: int, precision: torch.dtype) -> Section:
    """The adapted layers: each for files, by part and kind for a terminal."""
    total = sum(each.parameters for each in modules)
    name = str(precision).removeprefix("torch.")
    return Section(
        title="network",
        header=NETWORK_HEADER,
        rows=tuple(_module(each) for each in modules),
        digest=tuple(_kinds(modules)),
        lines=(f"{counted(len(modules), 'layer')}, {total:,} parameters; a file in {name} has {amount(size)}, without its metadata",),
        facts={"parameters": total, "file_bytes": size, "precision": name, "modules": [asdict(each) for each in modules]},
    )


def memory_section(facts: MemoryFacts) -> Section:
    """The memory by part, and both peaks."""
    phases = ", ".join(f"{phase.name} {amount(phase.bytes)}" for phase in facts.phases)
    return Section(
        title=f"memory in a training step of {facts.shape} (estimated, nothing was loaded)",
        header=MEMORY_HEADER,
        rows=tuple((part.name, part.place, amount(part.bytes), part.note) for part in facts.parts),
        lines=(
            f"most of the GPU: {phases}",
            f"peak: {amount(facts.gpu_peak)} of the GPU, {amount(facts.main_peak)} of main memory; {ERROR}",
            *facts.notes,
        ),
        facts={
            "width": facts.shape.width,
            "height": facts.shape.height,
            "batch": facts.shape.batch,
            "gpu_peak": facts.gpu_peak,
            "main_peak": facts.main_peak,
            "parts": [asdict(part) for part in facts.parts],
            "phases": [asdict(phase) for phase in facts.phases],
        },
    )


def _module(each: ModuleFacts) -> tuple[str, ...]:
    rank = "" if each.rank is None else str(each.rank)
    return each.part, each.group, each.name, " x ".join(map(str, each.shape)), rank, f"{each.parameters:,}"


def _kinds(modules: Sequence[ModuleFacts]) -> list[tuple[str, ...]]:
    """One row for the layers of one part, group and shape of rank; their shapes where they are alike."""
    kinds: dict[tuple[str, str, int | None], list[ModuleFacts]] = {}
    for each in modules:
        kinds.setdefault((each.part, each.group, each.rank), []).append(each)
    rows = []
    for (part, group, rank), members in kinds.items():
        shapes = {each.shape for each in members}
        shape = " x ".join(map(str, members[0].shape)) if len(shapes) == 1 else f"{len(shapes)} shapes"
        count = sum(each.parameters for each in members)
        rows.append((part, group, f"{len(members)}", shape, "" if rank is None else str(rank), f"{count:,}"))
    return rows
