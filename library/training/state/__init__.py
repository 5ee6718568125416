"""States of a run: all that a run needs to go on as if it had never been stopped."""
