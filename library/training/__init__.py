"""The training run: options, optimizer, schedule, steps, saving, metadata."""
