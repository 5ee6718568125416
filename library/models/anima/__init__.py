"""Anima: names of its layers (`names.py`) and its models without their weights (`outline.py`)."""
