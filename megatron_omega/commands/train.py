"""Train a configured run, as one of its processes (under deepspeed, torchrun, srun or `launch`), or alone.

    megatron-omega train --config omega-tiny --deepspeed_config zero1

--help lists every setting; --dry-run shows what would run (on WORLD_SIZE ranks, else on one replica).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.host.environment import announced_world_size, complete_environment, has_gpu
from megatron_omega.run.claims import notice_of_completion


def measure_machine() -> None:
    """Measure this machine for the forecast, once; the other ranks wait for rank 0 meanwhile."""
    from megatron_omega.studies.quick_calibration import calibrate_once

    if (seconds := calibrate_once()) is not None:
        print(f"measured this machine for the forecast, once, in {seconds:.0f} s", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """Parse, check, and train; or, with --dry-run, print what would be trained."""
    arguments = parse_arguments(argv)
    if arguments.dry_run:
        from megatron_omega.run.preview import describe

        print(describe(resolve_run(arguments, announced_world_size()), as_json=arguments.json))
        return
    place = complete_environment()
    resolved = resolve_run(arguments, place.world_size)
    if (notice := notice_of_completion(resolved.config)) is not None:
        if place.rank == 0:
            print(notice)
        return
    from megatron_omega.run.train import train  # torch starts only now: what is wrong above is told at once

    if place.rank == 0 and not has_gpu():
        measure_machine()
    train(resolved, place)
