"""Whether this machine can train, and what to do where it cannot: `python -m tools.doctor`."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from library.core.command_line import parse_command_line, run_script
from library.core.log import set_up_logging
from library.core.options import OptionError, option
from library.core.secrets import hidden
from library.core.spelling import unknown
from library.data.caches.entries import FOLDER
from library.data.config import read_datasets
from library.data.options import DataOptions
from library.models.architecture import architecture_named, architecture_names
from library.training.save import SaveOptions
from tools.health.attention import attention
from tools.health.devices import devices, every_device
from tools.health.disks import disks
from tools.health.finding import Check, Finding, Patient, fail, first_line
from tools.health.host import host
from tools.health.launching import launching
from tools.health.options import parsed, training_options
from tools.health.software import software
from tools.health.steps import steps

CHECKS: Mapping[str, Check] = {
    "options": training_options,
    "software": software,
    "devices": devices,
    "attention": attention,
    "host": host,
    "disks": disks,
    "launching": launching,
    "steps": steps,
}
"""Name of a check, as `--skip` takes it -> the check, in the order of the report."""
ABOUT = "Whether this machine can train. Options of a training script, or its --config_file, are looked at too where --family is given."


@dataclass(kw_only=True, frozen=True)
class DoctorOptions:
    """What is looked at."""

    family: str | None = option(None, help="only this model family, such as sdxl; the other options are then those of its training script")
    skip: tuple[str, ...] = option((), help=f"checks to leave out: {', '.join(CHECKS)}")
    json: bool = option(False, help="print the findings as JSON")

    def check(self) -> Iterable[str]:
        """What is wrong: an unknown family, checks that there are none of."""
        if self.family is not None and self.family not in architecture_names():
            yield f"--family: {unknown(self.family, architecture_names(), 'family')}"
        yield from (f"--skip: {unknown(name, CHECKS, 'check')}" for name in self.skip if name not in CHECKS)


def main(argv: list[str]) -> int:
    """Look, print, and return 1 where anything fails, else 0."""
    set_up_logging("ERROR")
    own, others = _split(argv)
    options = parse_command_line([DoctorOptions], own, prog="python -m tools.doctor", about=ABOUT)[DoctorOptions]
    if others and options.family is None:
        names = " or ".join(architecture_names())
        raise OptionError([f"{others[0]}: is an option of a training script; say of which with --family {names}"])
    patient = Patient(devices=every_device(), folders=_folders(options.family, others), family=options.family, arguments=tuple(others))
    started, found = time.perf_counter(), []
    for name in (name for name in CHECKS if name not in options.skip):
        for finding in findings(name, patient):
            found.append((name, finding))
            if not options.json:
                print(line_of(finding), flush=True)
    counts = Counter(finding.level for _, finding in found)
    if options.json:
        print(hidden(json.dumps({"counts": counts, "findings": [{"check": name, **asdict(finding)} for name, finding in found]}, indent=1)))
    else:
        seconds = time.perf_counter() - started
        print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed; {seconds:.0f} s")
    return int(counts["fail"] > 0)


def findings(name: str, patient: Patient) -> Iterator[Finding]:
    """What a check finds; a check that breaks is a finding too."""
    check = CHECKS[name](patient)
    try:
        while True:
            with redirect_stdout(sys.stderr):  # some packages greet there
                finding = next(check, None)
            if finding is None:
                return
            yield finding
    except Exception as error:  # a machine may be broken in ways that nobody thought of, and the other checks still tell something
        kind = type(error).__name__
        yield fail(name, f"this check broke off: {kind}: {first_line(error)}", f"look at what it says, or leave it out with --skip {name}")


def line_of(finding: Finding) -> str:
    """A finding as the screen shows it, without secrets."""
    advice = f"\n      -> {finding.advice}" if finding.advice else ""
    return hidden(f"{finding.level.upper():<4}  {finding.subject}: {finding.text}{advice}")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The doctor's own part of the command line, and the training script's."""
    own: list[str] = []
    others: list[str] = []
    into = others
    for word in argv:
        if word.startswith("-"):
            into = own if word.partition("=")[0] in ("--family", "--skip", "--json", "-h", "--help") else others
        into.append(word)
    return own, others


def _folders(family: str | None, arguments: Sequence[str]) -> tuple[Path, ...]:
    """Where the run would write its files and caches; the folder that the doctor is called in where that is not known."""
    if family is None or not arguments:
        return (Path(),)
    arch = architecture_named(family)
    try:
        options = parsed(arch, arguments)
        data, output = options[DataOptions], Path(options[SaveOptions].output_dir)
        caches = data.cache_latents_to_disk or data.cache_text_encoder_outputs_to_disk
        datasets = read_datasets(data, arch.default_resolution) if caches else []
    except ValueError:  # the check of the options says it
        return (Path(),)
    images = {Path(subset.image_dir) for dataset in datasets for subset in dataset.subsets if subset.image_dir}
    return (output, *(folder / FOLDER for folder in sorted(images)))


if __name__ == "__main__":
    run_script(lambda argv: sys.exit(main(argv)))
