#!/usr/bin/env python3
"""Start all processes of a run: on this machine, on several, under Slurm: `megatron-omega launch`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("launch", sys.argv[1:]))
