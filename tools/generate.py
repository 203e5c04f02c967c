#!/usr/bin/env python3
"""Continue a text with a trained model, from a checkpoint of any layout."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.generate import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
