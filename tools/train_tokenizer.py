#!/usr/bin/env python3
"""Learn a SentencePiece tokenizer with the mask, mode and sentinel ids that the objectives need."""

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.train_tokenizer import main

if __name__ == "__main__":
    with exit_cleanly():
        main()
