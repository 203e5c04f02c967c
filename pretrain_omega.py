#!/usr/bin/env python3
"""Pretrain GPT-Omega, the same as `megatron-omega train`. Started by deepspeed, torchrun, srun, or alone:

deepspeed pretrain_omega.py --config examples/omega-tiny/run.yaml --deepspeed_config ds_configs/zero1.json
"""

import sys
from collections.abc import Sequence

from megatron_omega.commands.main import run


def main(argv: Sequence[str]) -> int:
    """Train; return the exit code."""
    return run("train", argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
