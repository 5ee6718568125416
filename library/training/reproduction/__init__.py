"""Making a run again: its lock file, its inputs, and what surrounded it."""
