"""Faults done to real training: `make faults` prints what became of each, `make chaos` does many in one run."""
