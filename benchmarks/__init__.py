"""Measurements: speed, memory and loss curves, side by side in one process."""
