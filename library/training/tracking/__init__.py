"""What a run shows of itself: its log, trackers, and the figures that they get."""
