#!/usr/bin/env python3
"""Say how much of a run's wall time went into steps that count, over all its restarts, and where the rest went."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.goodput import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
