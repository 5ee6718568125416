"""Adapters in other words: conversions, sums, smaller ranks, and adapters fitted to a change that is known whole."""
