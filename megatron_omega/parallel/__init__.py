"""Parallel blocks: rank geometry, process groups, conjugate collectives, sharded layers, vocabulary-parallel loss."""
