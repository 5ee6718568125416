"""The report of a run: what `python -m tools.report` reads, and the page that it makes of it."""
