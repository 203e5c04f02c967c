"""Attacks on everything that is read: damaged streams, random configurations, mutated files. `make hostile`."""
