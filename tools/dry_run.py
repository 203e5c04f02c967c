#!/usr/bin/env python3
"""Rehearse a plan: run the real model code of every distinct stage on no data, and compare."""

import sys

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.rehearse import main

if __name__ == "__main__":
    with exit_cleanly():
        sys.exit(0 if main() else 1)
