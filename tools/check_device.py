#!/usr/bin/env python3
"""Check a device before it is trusted: `megatron-omega check-device`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("check-device", sys.argv[1:]))
