#!/usr/bin/env python3
"""Start a run on this machine, on several, or under Slurm; docs/launching.md shows each."""

import sys

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.launch import main

if __name__ == "__main__":
    with exit_cleanly():
        sys.exit(main())
