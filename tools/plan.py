#!/usr/bin/env python3
"""Rank every layout of a configuration on a number of accelerators, without a GPU: `megatron-omega plan`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("plan", sys.argv[1:]))
