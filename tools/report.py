"""A run as one page: curves, previews, layers, data, configuration: `python -m tools.report output_folder`."""

from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.core.atomic import write_text
from library.core.command_line import parse_command_line, run_script
from library.core.log import set_up_logging
from library.core.options import option
from library.training.plan import show
from tools.run_report.page import report_page
from tools.run_report.reading import RunFiles, find_run, read_run
from tools.screen import with_flags

PAGE = "report.html"


@dataclass(kw_only=True, frozen=True)
class ReportOptions:
    """Which run, and where its page goes."""

    run_dir: Path = option(help="output folder of a run, or the -run folder in it; may also stand first, without --run_dir")
    name: str | None = option(None, help="which run, where the folder holds several: their --output_name")
    out: Path | None = option(None, help=f"file of the page; {PAGE} in the -run folder where absent")
    open: Literal["yes", "no"] = option("yes", help="open the page in a browser, where there is one and somebody at the terminal")


def main(argv: list[str]) -> None:
    """Read a run, finished or in progress, and write its page. Raises `ValueError` where there is no run or nothing can be written."""
    set_up_logging("WARNING")
    argv = with_flags(argv, ("--run_dir",))
    about = "A run as one page that needs nothing else: curves, previews, layers, data, configuration. The folder may stand first."
    options = parse_command_line([ReportOptions], argv, prog="python -m tools.report", about=about)[ReportOptions]
    folder, name = find_run(options.run_dir, options.name)
    run = read_run(folder, name)
    page = (options.out or run.own_folder / PAGE).resolve()
    with _where_it_was_started(run):
        text = report_page(run)
    try:
        write_text(page, text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        raise ValueError(f"{page}: cannot be written ({error.strerror or error})") from error
    print(f"wrote {page} ({page.stat().st_size / 2**20:.1f} MB)")
    for problem in (*run.problems, *run.log.problems):
        print(f"warning: {problem}")
    if options.open == "yes":
        show(page)


@contextmanager
def _where_it_was_started(run: RunFiles) -> Iterator[None]:
    """Be in the folder that the paths of a lock file are relative to, as long as it is there."""
    started = None if run.lock is None else Path(str(run.lock.run.get("folder", "")))
    if started is None or not started.is_dir():
        yield
        return
    with chdir(started):
        yield


if __name__ == "__main__":
    run_script(main)
