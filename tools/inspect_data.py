#!/usr/bin/env python3
"""Look at shards, and at what a run read."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.inspect_data import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
