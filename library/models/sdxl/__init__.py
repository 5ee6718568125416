"""Stable Diffusion XL: facts and training step (`spec.py`), names, checkpoint files, text."""
