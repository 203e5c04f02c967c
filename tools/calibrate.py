#!/usr/bin/env python3
"""Measure this machine, so that plans and forecasts are about it: `megatron-omega calibrate`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("calibrate", sys.argv[1:]))
