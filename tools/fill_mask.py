#!/usr/bin/env python3
"""Predict masked tokens with a trained model: `megatron-omega fill-mask`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("fill-mask", sys.argv[1:]))
