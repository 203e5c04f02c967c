#!/usr/bin/env python3
"""Look into a checkpoint: its parameters, sizes and origin; whether it is whole; how it differs from another."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.inspect_checkpoint import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
