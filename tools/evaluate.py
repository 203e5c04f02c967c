#!/usr/bin/env python3
"""Measure the validation loss of a checkpoint, on as many ranks as it is started on, in any layout."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.validate import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
