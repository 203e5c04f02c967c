#!/usr/bin/env python3
"""Export a checkpoint as safetensors, config.json and tokenizer, and prove that the export says the same."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.export import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
