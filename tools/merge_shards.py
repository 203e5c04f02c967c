#!/usr/bin/env python3
"""Join shards into one: `megatron-omega merge-shards`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("merge-shards", sys.argv[1:]))
