#!/usr/bin/env python3
"""Find the best learning rate by successive halving: `megatron-omega sweep`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("sweep", sys.argv[1:]))
