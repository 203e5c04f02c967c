#!/usr/bin/env python3
"""Join shards into one, in the given order, copying bytes (of a Slurm array, for example)."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.merge_shards import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
