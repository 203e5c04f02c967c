#!/usr/bin/env python3
"""Plan a run without a GPU: rank every layout of a configuration on a number of accelerators."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.plan import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
