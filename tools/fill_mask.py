#!/usr/bin/env python3
"""Find what stands behind <mask> (or [MASK]), with the encoder and its MLM head, from a checkpoint of any layout."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.fill_mask import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
