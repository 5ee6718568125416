"""The page of a run: one file that needs nothing else, light or dark as the reader's system is."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from tools.run_report.curves import charts_html
from tools.run_report.dataset import dataset_html
from tools.run_report.facts import configuration_html, environment_html, events_html, files_html, tiles_html
from tools.run_report.layers import norms_html
from tools.run_report.look import policy, script, style
from tools.run_report.pictures import grid_html
from tools.run_report.reading import RunFiles


def report_page(run: RunFiles) -> str:
    """The whole page. Every text that comes from files is escaped; paths of the lock file are read from the folder we are in."""
    lock = run.lock
    sections = (
        ("curves", "Curves", charts_html(run.log)),
        ("previews", "Previews", grid_html(run.previews)),
        ("layers", "Change of the layers", norms_html(run.saved, family=_family(run), base=_base(run))),
        ("data", "Dataset", dataset_html(lock)),
        ("configuration", "Configuration", configuration_html(lock)),
        ("environment", "Environment", environment_html(lock)),
        ("events", "Events", events_html(run.log.events)),
        ("files", "Files", files_html(run)),
    )
    title = escape(f"{run.name}: report of a run")
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style()}</style></head><body><main>',
            f"<h1>{escape(run.name)}</h1><p>{escape(_about(run))}</p>",
            *_problems([*run.problems, *run.log.problems]),
            f"<nav>{links}</nav>{tiles_html(run)}",
            *(f'<section id="{anchor}"><h2>{name}</h2>{content}</section>' for anchor, name, content in sections),
            f"</main><script>{script()}</script></body></html>",
            "",
        ]
    )


def _about(run: RunFiles) -> str:
    if run.lock is None:
        return str(run.folder)
    options = {**run.lock.defaults, **run.lock.options}
    module, started = options.get("network_module", ""), run.lock.run.get("started", "")
    return (
        f"{module} on {Path(str(options.get('pretrained_model_name_or_path', ''))).name}, begun {started}, seed {run.lock.run.get('seed')}"
    )


def _family(run: RunFiles) -> str | None:
    return None if run.lock is None else str(run.lock.run.get("family"))


def _base(run: RunFiles) -> Path | None:
    """The base model, whose layer sizes a small adapter file does not tell; None where it is gone."""
    path = None if run.lock is None else run.lock.options.get("pretrained_model_name_or_path")
    return Path(path) if isinstance(path, str) and Path(path).exists() else None


def _problems(problems: Iterable[str]) -> Iterable[str]:
    for problem in problems:
        yield f'<p class="problem">{escape(problem)}</p>'
