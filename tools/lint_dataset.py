"""What is in a dataset, and what is wrong with it, without a model: `python -m tools.lint_dataset data.toml`."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.core.command_line import OptionSet, parse_command_line, run_script
from library.core.log import set_up_logging
from library.core.options import OptionError, option
from library.data.building import build_training_data
from library.data.dataset import TrainingData
from library.data.images.files import files_in, measure
from library.data.inspection.costs import ModelFacts
from library.data.inspection.findings import Report, finding
from library.data.inspection.report_text import report_text
from library.data.inspection.survey import survey
from library.data.inspection.writing import SAMPLES, write_report
from library.data.options import DataOptions
from library.models.architecture import Architecture, architecture_named, architecture_names
from library.models.forecast import model_facts
from tools.screen import with_flags


@dataclass(kw_only=True, frozen=True)
class LintOptions:
    """What is inspected for, and where the report goes."""

    family: str | None = option(None, help="the model family that will be trained, such as sdxl; by default what holds for all of them")
    model: Path | None = option(None, help="a model of the family (file or folder), whose tokenizer then counts the words of captions")
    json: Path | None = option(None, help="write the report there as JSON")
    html: Path | None = option(None, help="write the report there as a page, with the pictures as the model would see them")
    samples: int = option(SAMPLES, help="pictures of each bucket on the page")
    strict: bool = option(False, help="exit status 1 for warnings too")
    seed: int = option(0, help="seed of the crops, flips and captions that the page shows")

    def check(self) -> Iterable[str]:
        """What is wrong: an unknown family, a model of none, other endings, a number below one or in vain."""
        if self.family is not None and self.family not in architecture_names():
            yield f"--family {self.family}: there are {', '.join(architecture_names())}"
        if self.model is not None and self.family is None:
            yield f"--model {self.model}: say what it is with --family {' or '.join(architecture_names())}"
        if self.model is not None and not self.model.exists():
            yield f"--model {self.model}: no such file or folder"
        for name in ("json", "html"):
            file = getattr(self, name)
            if file is not None and file.suffix.lower() != f".{name}":
                yield f"--{name} {file}: give a file that ends with .{name}"
        if self.samples < 1:
            yield f"--samples {self.samples}: must be at least 1"
        elif self.samples != SAMPLES and self.html is None:
            yield f"--samples {self.samples}: has no effect without --html"


def main(argv: list[str]) -> int:
    """Inspect, print, write; returns 1 where there are errors (or with `--strict` warnings), else 0."""
    set_up_logging("WARNING")
    argv = with_flags(argv, ("--dataset_config",))
    about = "What is in a dataset, and what is wrong with it. A dataset file may stand first, without --dataset_config."
    options = parse_command_line([LintOptions, DataOptions], argv, prog="python -m tools.lint_dataset", about=about)
    chosen = options[LintOptions]
    data, report = inspect(options)
    print(report_text(report))
    for file in filter(None, (chosen.json, chosen.html)):
        title = str(options[DataOptions].dataset_config or options[DataOptions].train_data_dir)
        write_report(report, file, data, samples=chosen.samples, title=title)
        print(f"\nwrote {file}")
    return int(report.is_bad(strict=chosen.strict))


def inspect(options: OptionSet) -> tuple[TrainingData | None, Report]:
    """The data and the report; no data where the dataset file or the folders are so wrong that nothing can be made of them.

    Unreadable images are left out and reported, so that the rest is inspected too.
    """
    chosen, given = options[LintOptions], options[DataOptions]
    families = [architecture_named(name) for name in ([chosen.family] if chosen.family else architecture_names())]
    problems: list[str] = []
    try:
        data = _built(given, families, chosen.seed)
    except OptionError as error:
        problems += error.problems
        try:
            data = _built(replace(given, bad_images="skip"), families, chosen.seed)
        except OptionError as second:
            return None, Report(findings=tuple(finding("error", "dataset", text) for text in dict.fromkeys([*problems, *second.problems])))
    level = "warning" if given.bad_images == "skip" else "error"
    known = [*left_out(data), *(text for text in problems if not text.startswith("..."))]  # the first build counts what goes on and on
    found = [finding(level, "images", text) for text in dict.fromkeys(known)]
    return data, survey(data, [_facts(family, chosen.model) for family in families], found=found)


def left_out(data: TrainingData) -> list[str]:
    """What is wrong with the images of the folders that are not among the data."""
    folders = {subset.image_dir for dataset in data.datasets for subset in dataset.subsets if subset.image_dir and not subset.metadata_file}
    used = {image.path for source in (data, data.validation) if source is not None for image in source.images}
    return [
        text
        for folder in sorted(folders)
        for text in measure([path for path in files_in(folder) if path not in used], whole=True)[1].values()
    ]


def _built(given: DataOptions, families: Sequence[Architecture], seed: int) -> TrainingData:
    """The data, as every one of the families can take it."""
    step = math.lcm(*(family.resolution_step for family in families))
    return build_training_data(
        given, seed=seed, resolution_step=step, default_resolution=max(family.default_resolution for family in families)
    )


def _facts(family: Architecture, model: Path | None) -> ModelFacts:
    options = family.ModelOptions(pretrained_model_name_or_path=str(model or "."))
    return model_facts(family, options, has_model=model is not None)


if __name__ == "__main__":
    run_script(lambda argv: sys.exit(main(argv)))
