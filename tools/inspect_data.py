#!/usr/bin/env python3
"""Look at shards, and at what a run read: `megatron-omega inspect-data`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("inspect-data", sys.argv[1:]))
