"""The plan of a run: what it will see, said before a model is loaded, and nothing trained."""

import os
import sys
import webbrowser
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library.core.command_line import OptionSet
from library.core.devices import dtype_named
from library.core.log import get_logger
from library.core.options import option
from library.data.dataset import TrainingData
from library.data.inspection.findings import Report, finding
from library.data.inspection.report_text import report_text
from library.data.inspection.survey import survey
from library.data.inspection.writing import ending_problem, write_report
from library.data.options import DataOptions
from library.models.architecture import Architecture
from library.models.forecast import model_facts
from library.training.adapters import NetworkOptions
from library.training.forecast.memory import forecast_run
from library.training.forecast.modules import file_bytes, file_tensors, module_facts
from library.training.forecast.phases import Shape
from library.training.forecast.sections import memory_section, network_section, steps_section
from library.training.length import RunOptions
from library.training.previews import PreviewOptions
from library.training.rules import without_effect
from library.training.save import SaveOptions

logger = get_logger(__name__)
PAGE = "debug_dataset.html"


@dataclass(kw_only=True, frozen=True)
class PlanOptions:
    """Plan."""

    plan: bool = option(False, help="say what the run would see (images, buckets, captions, duplicates, costs) and end; nothing is loaded")
    plan_file: Path | None = option(
        None, help="write the plan there and end: .json, or .html with the pictures as the model would see them"
    )
    debug_dataset: bool = option(False, help=f"write the plan as {PAGE} into the output folder, open it where there is a browser, and end")

    def check(self) -> Iterable[str]:
        """What is wrong: a file whose ending says no format."""
        problem = ending_problem(self.plan_file)
        if problem is not None:
            yield f"--plan_file {self.plan_file}: {problem}"

    @property
    def is_asked(self) -> bool:
        """Shall the run be planned and not made?"""
        return self.plan or self.plan_file is not None or self.debug_dataset


def plan(arch: Architecture, options: OptionSet, data: TrainingData, *, run: Mapping[str, int], folder: Path) -> Report:
    """Inspect the data and the run, write the plan to standard output and to the files that were asked for, and return it.

    `run` holds what else is known: `steps_per_epoch`, `steps` and `processes`; `folder` is the output folder, for `--debug_dataset`.
    """
    chosen = options[PlanOptions]
    conflicts = [finding("warning", "options", sentence) for sentence in without_effect(options)] if _is_whole(options) else []
    report = survey(data, [model_facts(arch, options[arch.ModelOptions])], found=conflicts, run=run)
    if _is_whole(options):
        report = with_forecast(report, arch, options)
    sys.stdout.write(report_text(report) + "\n")
    files = [*([chosen.plan_file] if chosen.plan_file is not None else []), *([folder / PAGE] if chosen.debug_dataset else [])]
    for file in files:
        write_report(report, file, data, title=f"Plan for {arch.title}")
        logger.info("plan: wrote %s", file)
    if chosen.debug_dataset:
        show(folder / PAGE)
    return report


def with_forecast(report: Report, arch: Architecture, options: OptionSet) -> Report:
    """The report with what the run will train and the memory that it will need; what keeps it from being built is an error of it."""
    drawn = None
    if options[PreviewOptions].sample_prompts is not None:
        side = arch.default_resolution
        drawn = Shape(width=side, height=side, batch=1)
    try:
        found = forecast_run(arch, options, _shapes(report), text_is_cached=options[DataOptions].caches_text, drawn=drawn,
                             cached_bytes=_cached(report, options[DataOptions]))  # fmt: skip
    except ValueError as error:
        problems = [finding("error", "run", line) for line in str(error).splitlines()]
        return replace(report, findings=(*problems, *report.findings))
    chosen = options[SaveOptions].save_precision
    precision = torch.float32 if chosen is None else dtype_named(chosen)
    network = found.trained.network
    size = file_bytes(file_tensors(network), precision)
    steps = steps_section(report.run, options[RunOptions].gradient_accumulation_steps)
    sections = steps, network_section(module_facts(network), size, precision), memory_section(found.memory)
    return replace(report, sections=sections)


def show(page: Path) -> bool:
    """Open a page in the browser of whoever sits at the terminal; False where nobody does, or there is none."""
    has_screen = os.name == "nt" or sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and has_screen and webbrowser.open(page.resolve().as_uri())


def _is_whole(options: OptionSet) -> bool:
    """Are these the options of a whole run, not of its data alone?"""
    return NetworkOptions in options.groups


def _shapes(report: Report) -> list[Shape]:
    """The batches of every bucket that is trained on, the larger of full and last ones."""
    return [
        Shape(width=bucket.size[0], height=bucket.size[1], batch=facts.batch_size if bucket.batches > 1 else bucket.last_batch)
        for facts in report.datasets
        for bucket in facts.buckets
        if facts.role == "training"
    ]


def _cached(report: Report, data: DataOptions) -> int:
    """Bytes that caches hold in main memory: those that are not on disk."""
    in_memory = (
        ("latent_bytes", data.caches_latents and not data.cache_latents_to_disk),
        ("text_bytes", data.caches_text and not data.cache_text_encoder_outputs_to_disk),
    )
    return sum(getattr(facts, name) or 0 for name, counts in in_memory if counts for facts in report.caches)
