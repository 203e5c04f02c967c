"""Weights to hand on: written, described, compared, and loaded as one unsharded model."""
