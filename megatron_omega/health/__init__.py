"""Health of a run's ranks: what must hold before the start, weights that must agree, ranks slower than their peers."""
