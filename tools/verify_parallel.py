#!/usr/bin/env python3
"""Train under many layouts and compare every step: `megatron-omega verify-parallel`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("verify-parallel", sys.argv[1:]))
