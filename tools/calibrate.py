#!/usr/bin/env python3
"""Measure this machine, so that plans and forecasts are about it: tools/calibrate.py [--output runs/hardware.yaml]"""

from megatron_omega.commands.calibrate import main
from megatron_omega.commands.ending import exit_cleanly

if __name__ == "__main__":
    with exit_cleanly():
        main()
