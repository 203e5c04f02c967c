#!/usr/bin/env python3
"""Export a checkpoint as safetensors, and prove that the export says the same: `megatron-omega export-hf`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("export-hf", sys.argv[1:]))
