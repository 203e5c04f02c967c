#!/usr/bin/env python3
"""Learn a SentencePiece tokenizer with the ids that the objectives need: `megatron-omega train-tokenizer`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("train-tokenizer", sys.argv[1:]))
