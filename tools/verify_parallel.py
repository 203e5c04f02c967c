#!/usr/bin/env python3
"""Prove that layouts agree: train the same model for some steps under each, and compare losses and gradient norms."""

import sys

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.commands.verify_layouts import main

if __name__ == "__main__":
    with exit_cleanly():
        sys.exit(main())
