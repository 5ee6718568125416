"""Captions: read from files, and made ready at each use."""
