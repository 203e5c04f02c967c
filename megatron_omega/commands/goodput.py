"""Say how much of a run's wall time went into steps that count, over all its restarts, and where the rest went.

megatron-omega goodput --run runs/omega
megatron-omega goodput --run runs/omega --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron_omega.errors import DataError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.run_folder import EVENTS
from megatron_omega.monitoring.goodput import describe, goodput_of


def main(argv: Sequence[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.takes_run(positional=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object: every figure under its name")
    arguments = parser.parse_args(argv)
    if not (arguments.run / EVENTS).exists():
        raise DataError(f"{arguments.run / EVENTS} is missing; give the folder of a run that was started")
    goodput = goodput_of(arguments.run)
    print(json.dumps(goodput.to_json()) if arguments.json else "\n".join(describe(goodput)))
