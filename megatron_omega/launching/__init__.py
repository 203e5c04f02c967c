"""Start runs: on this host (supervisor), on several by ssh and under Slurm (scripts); say what an end means (judge).

Knows what a run leaves behind (exit codes, run folder), not how it trains. No torch here.
"""
