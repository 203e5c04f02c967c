#!/usr/bin/env python3
"""Say how much of a run's time went into steps that count: `megatron-omega goodput`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("goodput", sys.argv[1:]))
