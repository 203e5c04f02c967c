#!/usr/bin/env python3
"""Tokenize text into memory-mapped shards: `megatron-omega preprocess-data`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("preprocess-data", sys.argv[1:]))
