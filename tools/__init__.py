"""Commands beside training and generation: `python -m tools.NAME`."""
