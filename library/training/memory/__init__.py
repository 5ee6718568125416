"""Fitting into memory: activations computed twice, parked or bounded; blocks that wait in main memory."""
