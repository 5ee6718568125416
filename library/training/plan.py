"""The plan of a run: what it will see, said before a model is loaded, and nothing trained."""

import os
import sys
import webbrowser
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.core.command_line import OptionSet
from library.core.log import get_logger
from library.core.options import option
from library.data.dataset import TrainingData
from library.data.inspection.findings import Report
from library.data.inspection.report_text import report_text
from library.data.inspection.survey import survey
from library.data.inspection.writing import ending_problem, write_report
from library.models.architecture import Architecture
from library.models.forecast import model_facts

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
    """Inspect the data, write the plan to standard output and to the files that were asked for, and return it.

    `run` holds what else is known: `steps_per_epoch`, `steps` and `processes`; `folder` is the output folder, for `--debug_dataset`.
    """
    chosen = options[PlanOptions]
    report = survey(data, [model_facts(arch, options[arch.ModelOptions])], run=run)
    sys.stdout.write(report_text(report) + "\n")
    files = [*([chosen.plan_file] if chosen.plan_file is not None else []), *([folder / PAGE] if chosen.debug_dataset else [])]
    for file in files:
        write_report(report, file, data, title=f"Plan for {arch.title}")
        logger.info("plan: wrote %s", file)
    if chosen.debug_dataset:
        show(folder / PAGE)
    return report


def show(page: Path) -> bool:
    """Open a page in the browser of whoever sits at the terminal; False where nobody does, or there is none."""
    has_screen = os.name == "nt" or sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and has_screen and webbrowser.open(page.resolve().as_uri())
