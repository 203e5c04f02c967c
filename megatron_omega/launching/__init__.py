"""Start runs: on this host (supervisor), on several by ssh (hostfile), under Slurm (slurm); say what an end means.

Knows what a run leaves behind (exit codes, run folder), not how it trains. No torch here.
"""
