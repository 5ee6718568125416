"""What `python -m tools.doctor` looks at, one subject a file."""
