#!/usr/bin/env python3
"""Tokenize text into memory-mapped shards (Megatron's .bin/.idx), on all cores, resumable at any moment."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.preprocess import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
