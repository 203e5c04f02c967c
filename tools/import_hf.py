#!/usr/bin/env python3
"""Turn a folder that Transformers wrote into a checkpoint: `megatron-omega import-hf`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.main import run

if __name__ == "__main__":
    sys.exit(run("import-hf", sys.argv[1:]))
