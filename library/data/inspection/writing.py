"""Reports as files: `.json` for programs, `.html` for people."""

import json
from pathlib import Path

from library.core.atomic import write_text
from library.data.dataset import TrainingData
from library.data.inspection.contact_sheet import contact_sheets
from library.data.inspection.findings import Report
from library.data.inspection.report_html import report_html

ENDINGS = (".json", ".html")
SAMPLES = 24  # pictures of a bucket on the page


def ending_problem(path: Path | None) -> str | None:
    """Why no report can be written to a file of this name, or None."""
    if path is None or path.suffix.lower() in ENDINGS:
        return None
    return f"the ending '{path.suffix}' says no format; give a file that ends with {' or '.join(ENDINGS)}"


def write_report(report: Report, path: Path, data: TrainingData | None, *, samples: int = SAMPLES, title: str = "dataset") -> None:
    """Write a report in the format of the file's ending; the page shows pictures of `data`, as far as there are any.

    Raises `ValueError` where the file cannot be written.
    """
    if path.suffix.lower() == ".json":
        text = json.dumps(report.as_json(), indent=1) + "\n"
    else:
        text = report_html(report, contact_sheets(data, samples) if data is not None else (), title)
    try:
        write_text(path, text.encode("utf-8", "backslashreplace").decode())  # a file's name need not be Unicode
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from error
