#!/usr/bin/env python3
"""Run the model code of a planned layout without data, and compare with the plan: `megatron-omega dry-run`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("dry-run", sys.argv[1:]))
