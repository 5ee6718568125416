"""One folder per model family, and the questions each family answers (`architecture.py`)."""
