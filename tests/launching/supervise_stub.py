"""Supervise stub ranks, as `tools/launch.py local` does real ones: FOLDER RANKS MAX_RESTARTS."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_omega.launching.supervisor import Job, supervise
from megatron_omega.launching.turns import Turn
from megatron_omega.log import configure_logging

if __name__ == "__main__":
    folder, ranks, restarts = sys.argv[1:]
    configure_logging()
    stub = Path(__file__).with_name("stub.py")
    program = [sys.executable, str(stub), "--logging.run_directory", folder]
    turn = Turn(Path(folder), "local", max_restarts=int(restarts))
    sys.exit(supervise(Job(program, int(ranks), grace_seconds=0.5), turn).code)
